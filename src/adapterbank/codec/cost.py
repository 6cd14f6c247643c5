"""What vectors cost at a slope: bits and error of Gaussian parts, and of pairs ``s u v^T`` whose two sides are coded
apart.

Throughout, ``slope`` is the multiplier of the reverse water-filling: squared weighted error that one bit is worth. A
part with weight ``w`` (an error of size ``e`` costs ``w e^2``) is coded with ``step^2 = slope / (SLOPE w)``.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float

from adapterbank.codec.tables import CLASS_ZERO, CLASSES_PER_OCTAVE, SLOPE, rate_distortion_curve

CURVE_START, CURVE_END, CURVE_DENSITY = -4, 60, 32
"""Range of the looked-up curve in octaves of variance over squared step, and its points per octave."""
PAIR_OVERHEAD = 16.0
"""Bits of metadata a kept pair costs: one step and four classes, as differences from its neighbour's."""


@cache
def _dense_curve() -> tuple[np.ndarray, np.ndarray]:
    """The rate-distortion curve on a grid fine enough to be looked up without interpolation."""
    grid, rates, distortions = rate_distortion_curve()
    position = np.arange(CURVE_START, CURVE_END, 1 / CURVE_DENSITY)
    beyond = np.maximum(position - grid[-1], 0)
    # rounds to a class above CLASS_ZERO, so something is coded
    coded = position > (2 * CLASS_ZERO + 1) / CLASSES_PER_OCTAVE
    rate = np.where(coded, np.interp(position, grid, rates) + beyond / 2, 0.0)
    return rate, np.where(coded, np.interp(position, grid, distortions) * 2.0**-beyond, 1.0)


def gaussian_cost(
    variance: Float[np.ndarray, "..."], weight: Float[np.ndarray, "..."], slope: float
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """Bits a value and share of the variance lost, for Gaussian values at a slope.

    Args:
        variance: Variance of the values.
        weight: Cost of a unit of squared error.
        slope: Weighted squared error that one bit is worth.
    """
    rate, lost = _dense_curve()
    ratio = np.maximum(variance * weight * (SLOPE / slope), 2.0**CURVE_START)
    position = (np.log2(ratio) - CURVE_START) * CURVE_DENSITY
    index = np.minimum(position, len(rate) - 1).astype(np.int32)
    return rate[index], lost[index]


@dataclass(frozen=True, kw_only=True, eq=False)
class SideEnergy:
    """Unit vectors of one side as Gaussian parts: shared directions or bands of them, and (last) the remainder."""

    energy: Float[np.ndarray, "p g"]
    """Energy of each vector in each part; rows sum to 1."""
    size: Float[np.ndarray, "p g"]
    """Number of values in each part."""

    def cost(self, weight: Float[np.ndarray, " p"], slope: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Bits and squared error of each vector, and the share of its remainder that is lost, each ``(p,)``.

        Args:
            weight: What a unit of each vector's squared error costs.
            slope: Weighted squared error that one bit is worth.
        """
        rate, lost = gaussian_cost(self.energy / self.size, weight[:, None], slope)
        error = np.minimum(np.einsum("pg,pg->p", lost, self.energy), 1.0)
        return np.einsum("pg,pg->p", rate, self.size), error, lost[:, -1]


@dataclass(frozen=True, kw_only=True, eq=False)
class PairCost:
    """Cost of pairs at a slope; of two-tuples, the first is the input side."""

    keep: np.ndarray
    """Pairs worth coding; the others are dropped."""
    side_bits: tuple[Float[np.ndarray, " p"], Float[np.ndarray, " p"]]
    """Bits of each unit vector, if kept."""
    side_error: tuple[Float[np.ndarray, " p"], Float[np.ndarray, " p"]]
    """Squared error of each unit vector, if kept."""
    remainder_lost: tuple[Float[np.ndarray, " p"], Float[np.ndarray, " p"]]
    """Share of each vector's remainder that is lost, if kept."""
    bits: Float[np.ndarray, " p"]
    """Bits of each pair, 0 where dropped."""
    error: Float[np.ndarray, " p"]
    """Weighted squared error of each pair, its whole weight where dropped."""


def pair_cost(weight: Float[np.ndarray, " p"], side_in: SideEnergy, side_out: SideEnergy, slope: float) -> PairCost:
    """Cost of pairs whose error is ``weight * (1 - (1 - e_in) (1 - e_out))``: what ``s u v^T`` loses when both shrink.

    Args:
        weight: Weighted squared singular values.
        side_in: Energies of the right singular vectors.
        side_out: Energies of the left singular vectors.
        slope: Weighted squared error that one bit is worth.
    """
    error_out: np.ndarray = np.zeros_like(weight)
    # each side's errors count only as far as the other side survives; three rounds settle it
    for _ in range(3):
        bits_in, error_in, lost_in = side_in.cost(weight * (1 - error_out), slope)
        bits_out, error_out, lost_out = side_out.cost(weight * (1 - error_in), slope)
    bits = bits_in + bits_out + PAIR_OVERHEAD
    error = weight * (1 - (1 - error_in) * (1 - error_out))
    keep = error + slope * bits < weight
    return PairCost(
        keep=keep,
        side_bits=(bits_in, bits_out),
        side_error=(error_in, error_out),
        remainder_lost=(lost_in, lost_out),
        bits=np.where(keep, bits, 0.0),
        error=np.where(keep, error, weight),
    )


def basis_cost(
    weight: Float[np.ndarray, "..."], width: float | Float[np.ndarray, "..."], slope: float
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """Bits and weighted squared error of unit basis directions of ``width`` values each."""
    rate, lost = gaussian_cost(1 / np.asarray(width), weight, slope)
    return rate * width, lost * weight
