"""The Gaussian rate-distortion bound of a family's spectra: what coding each adapter alone could reach at best."""

import numpy as np

from benchmarks.curves import Originals


def gaussian_bound(originals: Originals, sizes: list[int]) -> list[float]:
    """Smallest RMS error at so many bytes, if entries of singular vectors are independent Gaussians.

    A pair ``s u v^T`` is ``d_in`` values of variance ``s^2 / d_in`` and ``d_out`` of ``s^2 / d_out``. Coding its sides
    to relative distortions ``D_in, D_out`` takes ``(d_in log2(1/D_in) + d_out log2(1/D_out)) / 2`` bits and leaves an
    error of ``s^2 (1 - (1 - D_in)(1 - D_out))``; a pair that is dropped costs nothing and leaves ``s^2``. Bits go where
    they buy most (reverse water-filling). A bank may be below: what adapters share is paid once.
    """
    energy, d_in, d_out = _pairs(originals)
    slopes = np.geomspace(1e-20, 10, 1000) * energy.mean()
    bits, lost = zip(*(_at(slope, energy, d_in, d_out) for slope in slopes), strict=True)
    # between two slopes bytes and squared error are shared out: a straight line, which is also the true hull
    size, square = np.array(bits)[::-1] / 8, np.array(lost)[::-1] / len(originals.adapters)
    return np.sqrt(np.interp(sizes, size, square)).tolist()


def _pairs(originals: Originals) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    energy, d_in, d_out = [], [], []
    for (name, _), update in originals.updates.items():
        share = update.S.double().square().numpy() / originals.energies[name]
        energy.append(share)
        d_in.append(np.full(len(share), update.Vh.shape[1]))
        d_out.append(np.full(len(share), update.U.shape[0]))
    return np.concatenate(energy), np.concatenate(d_in), np.concatenate(d_out)


def _at(slope: float, energy: np.ndarray, d_in: np.ndarray, d_out: np.ndarray) -> tuple[float, float]:
    """Bits and squared error of the best code at a price of ``slope`` for a bit."""
    # from d/dD of error + slope * bits: D_in (1 - D_out) = a d_in and D_out (1 - D_in) = a d_out
    a = slope / (2 * np.log(2) * np.maximum(energy, 1e-300))
    b = 1 + a * (d_out - d_in)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        # the smaller root, without its cancellation where a is tiny
        D_out = 2 * a * d_out / (b + np.sqrt(b * b - 4 * a * d_out))
        D_in = D_out - a * (d_out - d_in)
        bits = -(d_in * np.log2(D_in) + d_out * np.log2(D_out)) / 2
        lost = energy * (1 - (1 - D_in) * (1 - D_out))
        # no real solution, or one that costs more than dropping the pair
        coded = np.isfinite(bits) & (D_in > 0) & (D_out > 0) & (lost + slope * bits < energy)
    return float(bits[coded].sum()), float(lost[coded].sum() + energy[~coded].sum())
