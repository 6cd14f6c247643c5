"""Banks of plain values: exact ranks and 32-bit floats of the product fit, and the papers' methods."""

from collections.abc import Callable
from pathlib import Path

import torch

from adapterbank.bank.coding import PlainBasis, PlainSide, encode_plain_bases, is_core
from adapterbank.bank.family import Family, Progress
from adapterbank.bank.index import BankIndex, ModuleEntry
from adapterbank.bank.members import MemberConfigs, PlainCoder, plain_factors
from adapterbank.bank.partial import PartialFit
from adapterbank.bank.settings import FitSettings
from adapterbank.bank.statistics import check_k
from adapterbank.bank.writing import bank_bytes, fixed_bytes, write_bank
from adapterbank.codec.plain import packed_bytes
from adapterbank.errors import BankError
from adapterbank.subspace.eigenlora import RowStack


def fit_plain(
    family: Family, settings: FitSettings, directory: Path, partial: PartialFit | None, progress: Progress | None
) -> BankIndex:
    """Fit a bank of plain values; arguments as in ``fit.fit_bank``.

    Raises:
        BankError: If no number of components meets the target.
    """
    modules = [family.modules[name] for name in family.module_names()]
    configs = MemberConfigs()

    def write(k: int) -> BankIndex:
        bases = [_basis(family, module, settings, k, partial) for module in modules]
        payload, decoded = encode_plain_bases(bases, settings.plain_bits)
        coder = PlainCoder(family, modules, configs, bases=decoded, settings=settings)
        return write_bank(directory, payload, coder, settings, slope=0.0, progress=progress)

    if settings.k is not None:
        return write(settings.k)
    largest = max(sum(a.modules[m.name].rank for a in family.adapters if m.name in a.modules) for m in modules)
    room = settings.bytes(sum(family.values(i) for i in range(len(family.adapters))))
    if room is not None:
        return _largest_within(room, family, modules, settings, largest, write)
    # private rows are exact: they are the answer where a basis of the same precision takes more bytes
    private = write(0)
    error = settings.error or 0.0
    shared = _first(lambda k: _worst(found := write(k)) <= error and found, largest)
    return shared if shared is not None and bank_bytes(shared) < bank_bytes(private) else write(0)


def _worst(index: BankIndex) -> float:
    return max(member.error for member in index.members.values())


def _first(found: "Callable[[int], BankIndex | bool]", largest: int) -> BankIndex | None:
    """The bank of the smallest ``k`` in ``[1, largest]`` for which there is one; the error falls with ``k``."""
    low, high, kept = 0, largest + 1, None
    while high - low > 1:
        k = (low + high) // 2
        index = found(k)
        if isinstance(index, BankIndex):
            high, kept = k, index
        else:
            low = k
    return kept


def _largest_within(
    room: int,
    family: Family,
    modules: list[ModuleEntry],
    settings: FitSettings,
    largest: int,
    write: Callable[[int], BankIndex],
) -> BankIndex:
    """The bank of the most components within ``room`` bytes; bytes follow from shapes, so no fit is tried for them."""
    fixed = fixed_bytes(family, settings)
    if settings.method == "product" and fixed + _plain_bytes(family, modules, settings, 0) <= room:
        return write(0)
    k = max((k for k in range(1, largest + 1) if fixed + _plain_bytes(family, modules, settings, k) <= room), default=0)
    while k:
        index = write(k)
        if bank_bytes(index) <= room:
            return index
        k -= 1  # the index turned out a little longer than foreseen
    raise BankError(
        f"{room} bytes can't hold even one component a side; ask for a lower ratio or leave quantisation on"
    )


def _plain_bytes(family: Family, modules: list[ModuleEntry], settings: FitSettings, k: int) -> int:
    """Bytes of bases and coefficients for ``k`` components a side; 0: private rows."""
    bits, total = settings.plain_bits, 0
    for module in modules:
        ranks = [a.modules[module.name].rank for a in family.adapters if module.name in a.modules]
        fold = max(ranks) if settings.method == "flat" else 1
        for d in (module.d_in, module.d_out):
            width = fold * d
            size = min(k, width, sum(ranks) // fold)
            total += packed_bytes(size * width, bits)
            total += packed_bytes(width, bits) if settings.method != "product" and settings.mean == "affine" else 0
            total += sum(packed_bytes(rank // fold * (size or d), bits) for rank in ranks)
        if settings.method == "product" and k:
            k_in, k_out = min(k, module.d_in, sum(ranks)), min(k, module.d_out, sum(ranks))
            for rank in ranks:
                if is_core(k_in, k_out, rank):
                    total -= packed_bytes(rank * k_in, bits) + packed_bytes(rank * k_out, bits)
                    total += packed_bytes(k_in * k_out, bits)
    return total


def _basis(
    family: Family, module: ModuleEntry, settings: FitSettings, k: int, partial: PartialFit | None
) -> PlainBasis:
    if k == 0:
        return PlainBasis(side_in=_rows(torch.zeros(0, module.d_in)), side_out=_rows(torch.zeros(0, module.d_out)))
    if settings.method != "product":
        return _stacked(family, module, settings, k)
    if settings.k is not None:
        check_k(family, module, k)
    sketch = PartialFit.of_module(family, module) if partial is None else partial.module(module)
    side_in, side_out = (_rows(moment.basis(min(k, moment.rank_bound), seed=settings.seed)[0]) for moment in sketch)
    return PlainBasis(side_in=side_in, side_out=side_out)


def _rows(directions: torch.Tensor) -> PlainSide:
    return PlainSide(rows=directions, mean=None, fold=1)


def _stacked(family: Family, module: ModuleEntry, settings: FitSettings, k: int) -> PlainBasis:
    """The papers' bases: PCA of stacked rows, or of whole flattened factors.

    Raises:
        BankError: If a flat fit meets different ranks, or ``k`` is beyond the rank bound.
    """
    members = [i for i, a in enumerate(family.adapters) if module.name in a.modules]
    fold = 1
    if settings.method == "flat":
        ranks = sorted({family.adapters[i].modules[module.name].rank for i in members})
        if len(ranks) > 1:
            raise BankError(f"a flat bank needs one rank, {module.name} has {ranks}; use the product method")
        fold = ranks[0]
    stacks = [RowStack(fold * d, settings.mean) for d in (module.d_in, module.d_out)]
    for i in members:
        _, (A, B) = plain_factors(family, i, module.name, settings)
        for stack, rows in zip(stacks, (A, B.T), strict=True):
            stack.add(rows.reshape(-1, rows.shape[1] * fold))
    sides = []
    for stack in stacks:
        basis = stack.basis(k if settings.k is not None else min(k, stack.rank_bound))
        mean = basis.mean if settings.mean == "affine" else None
        sides.append(PlainSide(rows=basis.components, mean=mean, fold=fold))
    return PlainBasis(side_in=sides[0], side_out=sides[1])
