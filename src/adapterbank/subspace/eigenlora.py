"""EigenLoRA's Algorithm 1 (Kaushik et al., section 3.2; EigenLoRAx arXiv:2502.04700): PCA of stacked A or B^T rows.

For reproduction and as a baseline. The pair (A, B) is defined only up to an invertible r x r matrix, so what these
functions find depends on the gauge unless the factors are balanced first; ``product`` doesn't.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from adapterbank.errors import BankError
from adapterbank.subspace.moments import SecondMoment
from adapterbank.subspace.updates import balanced, thin_svd

Mean = Literal["affine", "drop", "none"]
Gauge = Literal["none", "balanced", "qr"]


@dataclass(frozen=True, kw_only=True, eq=False)
class RowBasis:
    """Basis of the stacked rows of one factor of one module."""

    components: Float[Tensor, "k d"]
    """Principal directions, orthonormal rows."""
    mean: Float[Tensor, " d"]
    """What is added back to a reconstruction; zero unless ``affine``."""
    singular_values: Float[Tensor, " q"]
    """All singular values of the (centred) stack, descending."""
    row_count: int
    """Rows in the stack: a share of energy means nothing beside too few of them."""

    def project(self, rows: Float[Tensor, "m d"]) -> Float[Tensor, "m k"]:
        """Least-squares coefficients of ``rows``: no training, no data (the paper's analytic projection)."""
        return (rows.to(self.mean.dtype) - self.mean) @ self.components.T

    def reconstruct(self, coefficients: Float[Tensor, "m k"]) -> Float[Tensor, "m d"]:
        """Rows ``coefficients @ components + mean``."""
        return coefficients @ self.components + self.mean


class RowStack:
    """The stacked rows of one factor as a stream: chunks and merges give the basis of one batch."""

    def __init__(self, d: int, mean: Mean = "affine") -> None:
        """Start empty.

        Args:
            d: Length of a row.
            mean: ``affine`` is Algorithm 1. ``drop`` is the official code: components of the centred stack,
                coefficients of the uncentred rows, the mean never added back. ``none`` never centres.
        """
        self.mode: Mean = mean
        self.row_count = 0
        self._mean = torch.zeros(d, dtype=torch.float64)
        self._moment = SecondMoment(d)

    @property
    def rank_bound(self) -> int:
        """Most components there can be: centring takes one."""
        centred = self.row_count - (self.mode != "none")
        return max(0, min(centred, self._moment.rank_bound))

    def add(self, rows: Float[Tensor, "m d"]) -> None:
        """Add ``m`` rows."""
        if self.mode == "none":
            self._moment.add(rows)
            self.row_count += len(rows)
        elif len(rows):
            wide = rows.double()
            self._shift(wide.mean(dim=0), len(rows))
            self._moment.add(wide - wide.mean(dim=0))

    def merge(self, other: "RowStack") -> None:
        """Add all rows of ``other``, which stays as it is.

        Raises:
            BankError: If the two treat the mean differently or have rows of different lengths.
        """
        if other.mode != self.mode:
            raise BankError(f"a stack with mean={other.mode!r} can't be merged into one with mean={self.mode!r}")
        if self.mode == "none":
            self.row_count += other.row_count
        elif other.row_count:
            self._shift(other._mean, other.row_count)
        self._moment.merge(other._moment)

    def basis(self, k: int) -> RowBasis:
        """Algorithm 1: the first ``k`` right singular vectors of the stack.

        Raises:
            BankError: If ``k`` is outside the rank bound.
        """
        if not 1 <= k <= self.rank_bound:
            taken = "" if self.mode == "none" else ", less one for the mean"
            raise BankError(
                f"k={k} is outside [1, {self.rank_bound}]: {self.row_count} stacked rows of {self._moment.d} "
                f"features{taken} have at most that rank"
            )
        components, _ = self._moment.basis(k)
        mean = self._mean if self.mode == "affine" else torch.zeros_like(self._mean)
        singular_values = self._moment.spectrum()[: self.rank_bound].sqrt()
        return RowBasis(
            components=components,
            mean=mean.float(),
            singular_values=singular_values.float(),
            row_count=self.row_count,
        )

    def _shift(self, mean: Float[Tensor, " d"], count: int) -> None:
        # Chan, Golub, LeVeque 1979: centring chunks one by one misses one rank-1 term per chunk, which is a row too
        both = self.row_count + count
        if self.row_count:
            step = mean - self._mean
            self._moment.add((step * math.sqrt(self.row_count * count / both))[None])
            self._mean = self._mean + step * (count / both)
        else:
            self._mean = mean
        self.row_count = both


def fit_rows(rows: Float[Tensor, "m d"], k: int, mean: Mean = "affine") -> RowBasis:
    """Algorithm 1 on one stack of rows, through the smaller of the two Grams.

    Args:
        rows: Every ``A`` of one module stacked, or every ``B.T``; 16-bit floats are computed in float32.
        k: Components.
        mean: See ``RowStack``.

    Raises:
        BankError: If ``k`` is outside the rank bound.
    """
    stack = RowStack(rows.shape[1], mean)
    stack.add(rows)
    return stack.basis(k)


def stack_factors(
    factors: Iterable[tuple[Tensor, Tensor, float]],
    canonicalize: Gauge = "none",
    weights: Sequence[float] | None = None,
) -> tuple[Float[Tensor, "m d_in"], Float[Tensor, "m d_out"]]:
    """Rows of every ``A`` and of every ``scale * B.T`` of one module, ranks as they come.

    Args:
        factors: ``(A, B, scale)`` per adapter that has the module.
        canonicalize: Gauge to bring each pair into first, see ``canonical``.
        weights: One factor per adapter for both sides; our extension, the paper has none.

    Raises:
        BankError: If there is no pair.
    """
    pairs = [canonical(A, B, scale, canonicalize) for A, B, scale in factors]
    if not pairs:
        raise BankError("no factors to stack")
    w = [1.0] * len(pairs) if weights is None else list(weights)
    rows_in = [weight * A for weight, (A, _) in zip(w, pairs, strict=True)]
    rows_out = [weight * B.T for weight, (_, B) in zip(w, pairs, strict=True)]
    return torch.cat(rows_in), torch.cat(rows_out)


def canonical(
    A: Float[Tensor, "r d_in"], B: Float[Tensor, "d_out r"], scale: float, gauge: Gauge
) -> tuple[Float[Tensor, "p d_in"], Float[Tensor, "d_out p"]]:
    """A pair with ``B' @ A' = scale * B @ A``, free of accidents of training.

    Args:
        A: Input factor.
        B: Output factor.
        scale: Folded into ``B``.
        gauge: ``none`` keeps the factors as trained (the paper); ``balanced`` takes singular vectors times
            ``sqrt(S)``, the same for every gauge; ``qr`` makes the rows of ``A`` orthonormal, which is the same for
            every gauge up to a rotation, so that uncentred bases are.
    """
    if gauge == "balanced":
        return balanced(thin_svd(A, B, scale))
    A, B = A.float(), scale * B.float()
    if gauge == "none":
        return A, B
    Q, R = torch.linalg.qr(A.T)  # (d_in, p), (p, r)
    sign = torch.where(R.diagonal() < 0, -1.0, 1.0)
    return (Q * sign).T, B @ (R.T * sign)


class Theorem1(NamedTuple):
    """Both right-hand sides of Theorem 1 (equation 1) for one factor."""

    delta: float
    """Sine of the largest angle between a row and the subspace."""
    by_original: float
    """``delta ||W||_F``, a bound on ``||W - W'||_F``."""
    by_projection: float
    """``tan(asin(delta)) ||W'||_F``, a bound on ``||W - W'||_F``; infinite for a row outside the subspace."""


def theorem1_bound(rows: Float[Tensor, "m d"], components: Float[Tensor, "k d"]) -> Theorem1:
    """Bounds on the error of projecting ``rows`` on a subspace, without mean.

    The paper writes the two as equal; in general they're two bounds.

    Args:
        rows: ``A`` or ``B.T``; zero rows are at no angle.
        components: Orthonormal rows.
    """
    wide, E = rows.double(), components.double()
    projected = wide @ E.T @ E
    lengths, residuals = wide.norm(dim=1), (wide - projected).norm(dim=1)
    delta = min(1.0, float((residuals / lengths.clamp_min(1e-300)).max()))
    by_projection = delta / math.sqrt(1 - delta**2) * float(projected.norm()) if delta < 1 else math.inf
    return Theorem1(delta, delta * float(wide.norm()), by_projection)
