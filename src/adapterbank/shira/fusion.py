"""Several sparse adapters as one, and how much they are in each other's way."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from adapterbank.errors import AdapterError
from adapterbank.shira.delta import SparseDelta, SparseUpdate
from adapterbank.shira.masks import dtype_of

OVERLAPS = ("sum", "mean", "last", "largest")
BLOCK_BYTES = 1 << 24
"""Of a product of two adapters at a time: of a layer of 4096, 512 columns."""


def fuse(
    deltas: Mapping[str, SparseDelta],
    *,
    weights: Mapping[str, float] | None = None,
    overlap: str = "sum",
    name: str = "fused",
) -> SparseDelta:
    """One adapter on the union of several adapters' positions: ``S = sum_i weight_i S_i`` (SHiRA, 4.2).

    Args:
        deltas: By any names, of one base model.
        weights: Of each, by its name; 1 where there is none.
        overlap: What a position gets that several have: their sum, as in the paper; ``mean``; the value of the ``last``
            one given; or the one of ``largest`` magnitude.
        name: Of the result.

    Returns:
        An adapter without task heads: theirs differ. Of its base it knows the layers in which one adapter has all the
        positions.

    Raises:
        AdapterError: If a shape or a base differs, a name or policy is unknown, or a weight isn't finite.
    """
    if not deltas:
        raise AdapterError("there is nothing to fuse; give at least one adapter")
    if overlap not in OVERLAPS:
        raise AdapterError(f"overlap={overlap!r} is unknown; choose from {', '.join(OVERLAPS)}")
    weights = dict(weights or {})
    if strangers := sorted(weights.keys() - deltas.keys()):
        raise AdapterError(f"weights has {strangers[0]!r}; the adapters are {', '.join(deltas)}")
    for key, weight in weights.items():
        if not math.isfinite(weight):
            raise AdapterError(f"the weight of {key!r} is {weight}; give a finite number")
    bases = {delta.base for delta in deltas.values() if delta.base}
    if len(bases) > 1:
        raise AdapterError(f"the adapters are of different base models: {', '.join(sorted(bases))}")
    parts: dict[str, list[tuple[float, SparseUpdate]]] = {}
    for key, delta in deltas.items():
        for parameter, update in delta.updates.items():
            parts.setdefault(parameter, []).append((float(weights.get(key, 1.0)), update))
    updates = {}
    for parameter, found in sorted(parts.items()):
        shapes = {update.shape for _, update in found}
        if len(shapes) > 1:
            raise AdapterError(f"{parameter} has different shapes: {', '.join(map(str, sorted(shapes)))}")
        updates[parameter] = _fused(found, overlap)
    first = next(iter(deltas.values()))
    return replace(first, name=name, updates=updates, base=bases.pop() if bases else None, mask=None, seed=None,
                   extras={}, config=_layout(deltas))  # fmt: skip


def _layout(deltas: Mapping[str, SparseDelta]) -> dict[str, Any]:
    """How the layers store their weights: the one thing in a config that holds for all adapters of a base."""
    return {"fan_in_fan_out": True} if any(delta.config.get("fan_in_fan_out") for delta in deltas.values()) else {}


def _fused(found: Sequence[tuple[float, SparseUpdate]], overlap: str) -> SparseUpdate:
    every = torch.cat([update.positions.long() for _, update in found])
    values = torch.cat([weight * update.values.float() for weight, update in found])
    union, place, counts = torch.unique(every, return_inverse=True, return_counts=True)
    if overlap in ("last", "largest"):
        # of those at one place the one that comes last wins: in the order given, or of magnitude
        order = torch.arange(len(values)) if overlap == "last" else values.abs().argsort(stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order))
        winner = torch.full((len(union),), -1).scatter_reduce(0, place, rank, "amax")
        fused = values[order[winner]]
    else:
        fused = torch.zeros(len(union)).index_add(0, place, values)
        if overlap == "mean":
            fused = fused / counts
    shape = found[0][1].shape
    known = (u.fingerprint for _, u in found if len(u.positions) == len(union))  # these are its positions
    return SparseUpdate(
        positions=union.to(dtype_of(shape)), values=fused, shape=shape, fingerprint=next(filter(None, known), None)
    )


# --- interference -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Interference:
    """How much two adapters are in each other's way, over the parameters that both change."""

    overlap: float
    """Share of the smaller one's positions that the other changes too."""
    awom: float
    """``sqrt(sum ||S1^T S2||_F^2)``: adapter weight orthogonality magnitude, smaller is better."""
    awor: float
    """Share of zeros in ``S1^T S2``: adapter weight orthogonality ratio, larger is better."""
    distance: float
    """``||S1 - S2||_F`` over all parameters of both."""


def interference(one: SparseDelta, other: SparseDelta) -> Interference:
    """Compare two adapters of one base model (SHiRA, 4.2 and appendix F).

    Raises:
        AdapterError: If a parameter has different shapes.
    """
    pairs = _common(one, other)
    found = [_energy_and_zeros(a, b) for a, b in pairs]
    return Interference(
        overlap=_overlap(pairs),
        awom=math.sqrt(sum(energy for energy, _ in found)),
        awor=sum(zeros for _, zeros in found) / sum(a.shape[1] ** 2 for a, _ in pairs) if pairs else 1.0,
        distance=_distance(one, other),
    )


def awom(one: SparseUpdate, other: SparseUpdate, *, order: Literal["fro", "spectral"] = "fro") -> float:
    """Adapter weight orthogonality magnitude, ``||S1^T S2||`` (the paper says "l2 norm": Frobenius, or spectral).

    The spectral norm needs the whole product: ``columns^2`` floats.
    """
    if order == "spectral":
        return float(torch.linalg.matrix_norm(torch.cat(list(_product(one, other)), 1).double(), ord=2))
    return math.sqrt(_energy_and_zeros(one, other)[0])


def awor(one: SparseUpdate, other: SparseUpdate) -> float:
    """Adapter weight orthogonality ratio, ``1 - ||S1^T S2||_0 / m^2``: the share of zeros."""
    return _energy_and_zeros(one, other)[1] / one.shape[1] ** 2


def _energy_and_zeros(first: SparseUpdate, second: SparseUpdate) -> tuple[float, int]:
    """``||S1^T S2||_F^2`` and its zeros; entries that cancel to zero count as such, as in the paper."""
    energy, zeros = 0.0, 0
    for block in _product(first, second):
        energy += float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2
        zeros += block.numel() - int(block.count_nonzero())
    return energy, zeros


def _product(first: SparseUpdate, second: SparseUpdate) -> Iterator[Float[Tensor, "columns block"]]:
    """``S1^T S2``, some columns at a time."""
    if first.shape != second.shape:
        raise AdapterError(
            f"the adapters' layers are {first.shape} and {second.shape}; compare those of one base model"
        )
    rows, columns = first.shape
    own_row, own_column = _coordinates(first)
    transposed = torch.sparse_coo_tensor(
        torch.stack([own_column, own_row]), first.values.float(), (columns, rows), check_invariants=False
    ).coalesce()  # once, not for every block
    row, column = _coordinates(second)
    width = max(1, BLOCK_BYTES // (4 * (rows + columns)))
    for start in range(0, columns, width):
        inside = (column >= start) & (column < start + width)
        block = torch.zeros(rows, min(width, columns - start))
        block[row[inside], column[inside] - start] = second.values[inside].float()
        yield torch.sparse.mm(transposed, block)


def _coordinates(update: SparseUpdate) -> tuple[Tensor, Tensor]:
    rows = update.positions.long() // update.shape[1]
    return rows, update.positions.long() - rows * update.shape[1]


def overlaps(deltas: Mapping[str, SparseDelta]) -> dict[str, dict[str, float]]:
    """:attr:`Interference.overlap` between all adapters."""
    found = {name: dict.fromkeys(deltas, 1.0) for name in deltas}
    for one, other in combinations(deltas, 2):
        found[one][other] = found[other][one] = _overlap(_common(deltas[one], deltas[other]))
    return found


def _common(one: SparseDelta, other: SparseDelta) -> list[tuple[SparseUpdate, SparseUpdate]]:
    common = sorted(one.updates.keys() & other.updates.keys())
    return [(one.updates[parameter], other.updates[parameter]) for parameter in common]


def _overlap(pairs: Sequence[tuple[SparseUpdate, SparseUpdate]]) -> float:
    shared = sum(int(torch.isin(a.positions.long(), b.positions.long()).sum()) for a, b in pairs)
    fewest = min(sum(len(a.positions) for a, _ in pairs), sum(len(b.positions) for _, b in pairs))
    return shared / fewest if fewest else 0.0


def distances(deltas: Mapping[str, SparseDelta]) -> dict[str, dict[str, float]]:
    """``||S_i - S_j||_F`` between all adapters and the base model, which is ``base`` (SHiRA, table 13).

    Raises:
        AdapterError: If an adapter is called ``base``, or shapes differ.
    """
    if "base" in deltas:
        raise AdapterError("an adapter is called 'base', as the base model is here; give it another name")
    every = {"base": SparseDelta(name="base", updates={}), **deltas}
    found = {name: dict.fromkeys(every, 0.0) for name in every}
    for one, other in combinations(every, 2):
        found[one][other] = found[other][one] = _distance(every[one], every[other])
    return found


def _distance(one: SparseDelta, other: SparseDelta) -> float:
    minus = fuse({"one": replace(one, base=None), "other": replace(other, base=None)}, weights={"other": -1.0})
    return math.sqrt(sum(float(update.values.double().square().sum()) for update in minus.updates.values()))
