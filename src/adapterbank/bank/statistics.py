"""What the allocation needs to know of a family: directions per module, and how well they explain its updates."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from adapterbank.bank.family import Family, Progress
from adapterbank.bank.index import ModuleEntry
from adapterbank.bank.partial import PartialFit
from adapterbank.codec.allocate import ModuleStatistics, SideStatistics, basis_sizes
from adapterbank.errors import BankError
from adapterbank.subspace.moments import SecondMoment

MOST_DIRECTIONS = 256
"""Shared directions a side that the allocation may choose from; more have not paid in any family measured."""
STATISTICS_ADAPTERS = 48
"""Most adapters whose spectra decide where the bytes go, evenly spaced over the family."""
STATISTICS_PAIRS = 8192
"""Singular pairs that are enough for it: fewer adapters are taken where each has many, but at least 8."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Directions:
    """Leading eigenvectors of both sides of one module, before any coding, with the weighted energy along each."""

    module: ModuleEntry
    V: Float[Tensor, "k_in d_in"]
    U: Float[Tensor, "k_out d_out"]
    weight_in: Float[np.ndarray, " k_in"]
    weight_out: Float[np.ndarray, " k_out"]


def even_sample(names: Sequence[str], most: int) -> list[int]:
    """Up to ``most`` indices into ``names``, evenly spaced over their sorted order: the order given must not matter."""
    order = sorted(range(len(names)), key=names.__getitem__)
    return [order[x] for x in sorted({int(x) for x in np.linspace(0, len(names) - 1, min(len(names), most))})]


def check_k(family: Family, module: ModuleEntry, k: int) -> None:
    """Compare a fixed ``k`` with what a module can give.

    Raises:
        BankError: If it is more; the message names the rank.
    """
    ranks = [a.modules[module.name].rank for a in family.adapters if module.name in a.modules]
    bound = min(sum(ranks), module.d_in, module.d_out)
    if k > bound:
        raise BankError(
            f"k={k} is more than {module.name} has: {len(ranks)} adapters of together rank {sum(ranks)} on a "
            f"{module.d_in} -> {module.d_out} layer give at most {bound} directions"
        )


def find_directions(
    family: Family, k: int | None, partial: PartialFit | None, progress: Progress | None, seed: int = 0
) -> list[Directions]:
    """Leading eigenvectors of every module, from a sketch or from the adapters.

    Args:
        family: The adapters.
        k: Exactly so many; as many as may pay by default.
        partial: A sketch of the family.
        progress: Called after each module.
        seed: Of the randomised range finder.

    Raises:
        BankError: If a module has fewer than ``k``.
    """
    found = []
    for done, name in enumerate(family.module_names(), start=1):
        module = family.modules[name]
        if k is not None:
            check_k(family, module, k)
        sketch = PartialFit.of_module(family, module) if partial is None else partial.module(module)
        members = sum(name in a.modules for a in family.adapters)
        (V, weight_in), (U, weight_out) = (_leading(moment, k, members, seed) for moment in sketch)
        found.append(Directions(module=module, V=V, U=U, weight_in=weight_in, weight_out=weight_out))
        if progress:
            progress("finding shared directions", done, len(family.modules))
    return found


def _leading(moment: SecondMoment, k: int | None, members: int, seed: int) -> tuple[Tensor, np.ndarray]:
    # one adapter shares nothing with anybody
    size = k if k is not None else min(moment.rank_bound, MOST_DIRECTIONS) if members > 1 else 0
    if size == 0:
        return torch.zeros(0, moment.d), np.zeros(0)
    directions, energy = moment.basis(size, seed=seed)
    return directions, energy[:size].double().numpy()


def measure(
    family: Family, directions: list[Directions], progress: Progress | None
) -> tuple[list[ModuleStatistics], int]:
    """Statistics of every module over an even sample of the adapters, and the size of the sample."""
    pairs = sum(shape.rank for adapter in family.adapters for shape in adapter.modules.values())
    enough = max(8, STATISTICS_PAIRS * len(family.adapters) // max(pairs, 1))
    sample = even_sample(family.names(), min(STATISTICS_ADAPTERS, enough))
    chosen = [i for i in sample if family.weight(i) > 0]
    statistics = []
    for done, found in enumerate(directions, start=1):
        statistics.append(_of_module(family, found, chosen))
        if progress:
            progress("measuring", done, len(directions))
    return statistics, max(len(chosen), 1)


def _of_module(family: Family, found: Directions, chosen: list[int]) -> ModuleStatistics:
    members = [i for i in chosen if found.module.name in family.adapters[i].modules]
    updates = [family.update(i, found.module.name) for i in members]
    weight = [family.weight(i) * u.S.double().numpy() ** 2 for i, u in zip(members, updates, strict=True)]
    return ModuleStatistics(
        weight=np.concatenate([np.zeros(0), *weight]),
        side_in=_of_side(found.V, found.weight_in, [u.Vh for u in updates]),
        side_out=_of_side(found.U, found.weight_out, [u.U.T for u in updates]),
    )


def _of_side(directions: Tensor, energy: np.ndarray, vectors: list[Tensor]) -> SideStatistics:
    sizes = basis_sizes(len(directions))
    explained = [np.zeros((0, len(sizes)))]
    for rows in vectors:
        energies = (rows @ directions.T).double().square().cumsum(dim=1).numpy()
        explained.append(np.pad(energies, ((0, 0), (1, 0)))[:, sizes])
    return SideStatistics(
        width=directions.shape[1], sizes=sizes, explained=np.concatenate(explained), direction_weight=energy
    )
