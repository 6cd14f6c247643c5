"""One entropy-constrained scalar quantiser per class of Gaussian values, as integer tables a decoder can reproduce.

A *class* ``c`` says how wide the values are against the step: ``sigma / step = 2 ** (c / CLASSES_PER_OCTAVE)``. With
uniform reconstruction levels, thresholds that weigh bits against error, and centroids as decoded values, the best
step of a unit Gaussian at slope ``lam`` (squared error per bit) is ``step**2 = 6 lam / ln 2`` at every rate to within
0.1 %, so one multiplier sets every step (Sullivan, "Efficient scalar quantization of exponential and Laplacian random
variables", 1996, for the thresholds; the constant is the high-rate slope of the uniform quantiser).
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

CLASSES_PER_OCTAVE = 4
CLASS_ZERO = -6
"""Values this narrow against the step are cheaper dropped than coded; the class itself means "nothing is coded"."""
CLASS_TOP = 16
"""Widest class with a table of its own; wider values send their low bits as they are."""
SLOPE = math.log(2) / 6
"""Squared error that one bit is worth, in squared steps."""
FREQUENCY_BITS = 16
TAIL = 2e-3
"""Share of a wider Gaussian mixed into the tables: real factors have heavier tails than a Gaussian."""
TAIL_WIDTH = 3.0


@dataclass(frozen=True, kw_only=True)
class Quantiser:
    """Scalar quantiser of one class, in units of the step; symbols are ``-top .. top``."""

    top: int
    """Largest magnitude with a symbol of its own; the outermost symbol means "this or more"."""
    thresholds: np.ndarray
    """``(top,)``: magnitude ``m`` begins at ``thresholds[m - 1]``."""
    levels: np.ndarray
    """``(top + 1,)``: decoded magnitude, the centroid of its cell."""
    frequencies: np.ndarray
    """``(2 * top + 1,)``: integer frequencies of the symbols ``-top .. top``; sum about ``2**16``, none is zero."""
    rate: float
    """Bits a value."""
    distortion: float
    """Mean squared error, as a share of the variance."""


def _upper_tail(z: np.ndarray) -> np.ndarray:
    return np.array([0.5 * math.erfc(v / math.sqrt(2)) for v in z])


def _density(z: np.ndarray) -> np.ndarray:
    density: np.ndarray = np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return density


@cache
def quantiser(class_: int) -> Quantiser:
    """Build the quantiser of ``class_`` in ``(CLASS_ZERO, CLASS_TOP]``.

    Raises:
        ValueError: If the class has no table.
    """
    if not CLASS_ZERO < class_ <= CLASS_TOP:
        raise ValueError(f"class {class_} is outside ({CLASS_ZERO}, {CLASS_TOP}]")
    sigma = 2 ** (class_ / CLASSES_PER_OCTAVE)
    top = math.ceil(6 * sigma) + 2
    magnitudes = np.arange(top + 1)
    levels = magnitudes.astype(float)
    thresholds = magnitudes[1:] - 0.5
    # Lloyd's iteration with the cost of a symbol in the thresholds; 40 rounds change nothing beyond the 6th digit
    for _ in range(40):
        edges = np.concatenate([[0.0], thresholds, [np.inf]]) / sigma
        tail = _upper_tail(edges)
        mass = np.maximum(tail[:-1] - tail[1:], 1e-12)  # one-sided; both signs of m >= 1 cost the same
        bits = -np.log2(np.where(magnitudes == 0, 2 * mass, mass))
        centre = sigma * (_density(edges[:-1]) - _density(edges[1:])) / mass
        levels = np.where(magnitudes == 0, 0.0, np.where(mass > 1e-11, centre, magnitudes))
        gap = np.maximum(np.diff(levels), 1e-6)
        thresholds = (levels[1:] + levels[:-1]) / 2 + SLOPE * np.diff(bits) / (2 * gap)
        thresholds = np.maximum.accumulate(np.clip(thresholds, 0.5, magnitudes[1:]))
    edges = np.concatenate([[0.0], thresholds, [np.inf]])
    narrow, wide = _upper_tail(edges / sigma), _upper_tail(edges / (TAIL_WIDTH * sigma))
    mass = (1 - TAIL) * (narrow[:-1] - narrow[1:]) + TAIL * (wide[:-1] - wide[1:])
    frequencies = np.maximum(np.round(mass * 2**FREQUENCY_BITS), 1)
    frequencies[0] *= 2
    share = 2 * mass
    rate = float(-(share * np.log2(np.where(magnitudes == 0, 2 * mass, mass))).sum())
    # E[(x - level)^2] of the pure Gaussian: the centroid condition makes it the variance less the energy of the levels
    clean = narrow[:-1] - narrow[1:]
    distortion = 1 - float((2 * clean * levels**2).sum()) / sigma**2
    return Quantiser(
        top=top,
        thresholds=thresholds,
        levels=levels,
        frequencies=np.concatenate([frequencies[:0:-1], frequencies]).astype(np.int64),
        rate=rate,
        distortion=distortion,
    )


@cache
def rate_distortion_curve() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bits a value and relative squared error of a unit Gaussian against ``log2(variance / step**2)``, for the
    allocation.

    Returns:
        ``(log_ratio, rate, distortion)``, each ``(m,)``, ``log_ratio`` ascending. Below the first entry nothing is
        coded; above the last, each octave of variance costs half a bit and leaves half the relative error.
    """
    classes = range(CLASS_ZERO + 1, CLASS_TOP + 1)
    tables = [quantiser(c) for c in classes]
    log_ratio = np.array([2 * c / CLASSES_PER_OCTAVE for c in classes])
    return log_ratio, np.array([t.rate for t in tables]), np.array([t.distortion for t in tables])
