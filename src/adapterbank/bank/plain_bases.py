"""Bases of plain banks: exact ranks of the product fit, and the papers' methods on stacked or flattened factors."""

import torch
from torch import Tensor

from adapterbank.bank.coding import Pair, PlainBasis, PlainSide
from adapterbank.bank.family import Family
from adapterbank.bank.index import ModuleEntry
from adapterbank.bank.partial import PartialFit
from adapterbank.bank.settings import FitSettings
from adapterbank.errors import BankError
from adapterbank.subspace.eigenlora import RowStack, canonical
from adapterbank.subspace.updates import ThinUpdate, balanced, thin_svd


def plain_bases(
    family: Family, modules: list[ModuleEntry], settings: FitSettings, k: int, partial: PartialFit | None
) -> list[PlainBasis]:
    """Bases of ``k`` directions a side, or as many as a module has.

    Raises:
        BankError: If a flat fit meets different ranks.
    """
    if settings.method == "product":
        return [_product(family, module, k, partial) for module in modules]
    return [_stacked(family, module, settings, k) for module in modules]


def plain_factors(family: Family, i: int, module: str, settings: FitSettings) -> tuple[ThinUpdate, Pair]:
    """Update and factors at scale 1 of one module, in the gauge that the method codes."""
    factors = family.adapters[i].factors(module)
    if settings.method == "product":
        update = family.update(i, module)
        A, B = balanced(update)
        missing = factors.rank - len(A)  # a rank beyond the layer's own sizes: the table still says r
        return update, (torch.nn.functional.pad(A, (0, 0, 0, missing)), torch.nn.functional.pad(B, (0, missing)))
    return thin_svd(factors.A, factors.B, factors.scale), _gauged(family, i, module, settings)


def _gauged(family: Family, i: int, module: str, settings: FitSettings) -> Pair:
    factors = family.adapters[i].factors(module)
    # the scale goes into both sides alike: folded into one it would count for nothing in the other
    root = abs(factors.scale) ** 0.5
    sign = -1.0 if factors.scale < 0 else 1.0
    A, B = root * factors.A, sign * root * factors.B
    return canonical(A, B, 1.0, "balanced") if settings.balance else (A, B)


def _product(family: Family, module: ModuleEntry, k: int, partial: PartialFit | None) -> PlainBasis:
    members = [a for a in family.adapters if module.name in a.modules]
    rows = sum(a.modules[module.name].rank for a in members)
    sketch = PartialFit.of_module(family, module, rows) if partial is None else partial.module(module)
    sides = []
    for moment in sketch:
        size = min(k, moment.rank_bound)
        directions: Tensor = moment.basis(size)[0] if size else torch.zeros(0, moment.d)
        sides.append(PlainSide(rows=directions, mean=None, fold=1))
    return PlainBasis(side_in=sides[0], side_out=sides[1])


def _stacked(family: Family, module: ModuleEntry, settings: FitSettings, k: int) -> PlainBasis:
    members = [i for i, a in enumerate(family.adapters) if module.name in a.modules]
    fold = 1
    if settings.method == "flat":
        ranks = {family.adapters[i].modules[module.name].rank for i in members}
        if len(ranks) > 1:
            raise BankError(f"a flat bank needs one rank; {module.name} has {sorted(ranks)}; use the product method")
        fold = ranks.pop()
    stacks = (RowStack(fold * module.d_in, settings.mean), RowStack(fold * module.d_out, settings.mean))  # type: ignore[arg-type]
    for i in members:
        A, B = _gauged(family, i, module.name, settings)
        for stack, rows in zip(stacks, (A, B.T), strict=True):
            stack.add(rows.reshape(-1, rows.shape[1] * fold))
    sides = []
    for stack in stacks:
        basis = stack.basis(min(k, stack.rank_bound)) if settings.k is None else stack.basis(k)
        mean = basis.mean if settings.mean == "affine" else None
        sides.append(PlainSide(rows=basis.components, mean=mean, fold=fold))
    return PlainBasis(side_in=sides[0], side_out=sides[1])
