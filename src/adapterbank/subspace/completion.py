"""Orthonormal bases from what there is: nearly orthonormal rows made exact, missing ones drawn or completed."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from adapterbank.errors import BankError
from adapterbank.subspace.moments import SecondMoment
from adapterbank.subspace.updates import leading_sign

DEPENDENT = 0.1
"""A direction that keeps less than this of its length beside the earlier ones is no direction of its own."""
NULL = 1e-10
"""Share of the rows' energy below which a direction is float32's rounding."""


def orthonormal(
    rows: Float[Tensor, "m d"], against: Float[Tensor, "k d"] | None = None, *, dependent: float = DEPENDENT
) -> Float[Tensor, "p d"]:
    """Orthonormal rows with the span of ``rows``, in their order, orthogonal to ``against``.

    Args:
        rows: Any rows; what they have in common with earlier ones is taken out.
        against: Orthonormal rows.
        dependent: Rows of which less than this share of their length is new are left out, zero rows too.

    Returns:
        At most ``min(m, d - k)`` rows; each has a positive product with the row it came from.
    """
    wide = rows.double()
    if against is not None and len(against):
        fixed = against.double()
        # twice is enough (Kahan, Parlett): once leaves rounding of the size of what was taken out
        for _ in range(2):
            wide = wide - wide @ fixed.T @ fixed
    lengths = rows.double().norm(dim=1)
    kept: list[Tensor] = []
    for row, length in zip(wide, lengths, strict=True):
        left = row
        for _ in range(2):
            for unit in kept:
                left = left - (left @ unit) * unit
        norm = left.norm()
        if norm > dependent * length and length > 0:
            kept.append(left / norm)
    return torch.stack(kept).float() if kept else rows.new_zeros(0, rows.shape[1], dtype=torch.float32)


def random_directions(
    count: int, d: int, against: Float[Tensor, "k d"], *, seed: int, uniform: bool = False
) -> Float[Tensor, "count d"]:
    """Seeded random orthonormal rows orthogonal to a basis (EigenLoRAx's augmentation, spec.md 2.7).

    Args:
        count: How many.
        d: Their length.
        against: Orthonormal rows.
        seed: The same seed gives the same rows, so they need not be stored.
        uniform: Draw from [0, 1) as the official code does, not from a Gaussian.

    Raises:
        BankError: If there is no room for so many.
    """
    if count > d - len(against):
        raise BankError(f"{count} more directions don't fit beside {len(against)} of {d} features")
    seeded = torch.Generator().manual_seed(seed)
    draw = torch.rand if uniform else torch.randn
    found = orthonormal(draw(count, d, generator=seeded), against, dependent=1e-4)
    while len(found) < count:  # a basis that was drawn from the same seed swallows some
        more = draw(count - len(found), d, generator=seeded)
        found = torch.cat([found, orthonormal(more, torch.cat([against, found]), dependent=1e-4)])
    return found


def leading_directions(matrix: Float[Tensor, "m d"], count: int, against: Float[Tensor, "k d"]) -> Float[Tensor, "p d"]:
    """Leading right singular vectors of a matrix with the span of ``against`` taken out, at most ``count``."""
    left = matrix.float() - matrix.float() @ against.T @ against
    _, S, Vh = torch.linalg.svd(left, full_matrices=False)
    # against the whole matrix: what is left of one that lies in the basis is rounding
    found = Vh[: int((S[:count] > 1e-5 * matrix.norm()).sum())]
    return orthonormal(found * leading_sign(found)[:, None], against)


def probe(rows: Float[Tensor, "k d"], row_phase: float, column_phase: float) -> float:
    """One number that changes when any of the rows turns: ``a^T rows b`` with fixed cosines for ``a`` and ``b``.

    Args:
        rows: Directions.
        row_phase: Tells the same rows in one place from those in another.
        column_phase: The same for columns.
    """
    k, d = rows.shape
    # irrational steps, so that no two entries repeat
    left = torch.cos(torch.arange(k, dtype=torch.float64) * 2.399963 + row_phase)
    right = torch.cos(torch.arange(d, dtype=torch.float64) * 1.7320508 + column_phase)
    return float(left @ rows.double().cpu() @ right)


def complete(stored: Float[Tensor, "s d"], blocks: Iterable[Float[Tensor, "_ d"]], k: int) -> Float[Tensor, "p d"]:
    """Orthonormal rows: those of ``stored`` first, then the leading directions of what they leave of ``blocks``.

    Args:
        stored: Orthonormal rows.
        blocks: Weighted rows.
        k: How many in all.

    Returns:
        ``k`` rows, or as many as ``stored`` and ``blocks`` have together.
    """
    if len(stored) >= k:
        return stored[:k]
    moment, energy = SecondMoment(stored.shape[1]), 0.0
    for rows in blocks:
        energy += float(rows.double().square().sum())
        moment.add(rows - rows @ stored.T @ stored)
    # stored directions may be coarse and so lie outside of the rows: together there are no more than the rows give
    missing = min(k, moment.rank_bound, stored.shape[1]) - len(stored)
    if missing <= 0:
        return stored
    found, values = moment.basis(missing)
    # where the rows have fewer directions left, the rest of the moment's are rounding, another on every machine
    told = values[: len(found)] > NULL * energy
    return torch.cat([stored, orthonormal(found[told], stored)])
