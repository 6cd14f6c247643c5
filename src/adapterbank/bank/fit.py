"""From a family of adapters to the files of a bank: bases, allocation, members, at the bytes or the error asked for."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from adapterbank.bank import store
from adapterbank.bank.coding import (
    PlainBasis,
    Slot,
    decode_predictive_bases,
    encode_plain,
    encode_plain_bases,
    encode_predictive,
    pack,
)
from adapterbank.bank.family import Family, Progress
from adapterbank.bank.index import BankIndex, MemberEntry, ModuleEntry
from adapterbank.bank.partial import PartialFit
from adapterbank.bank.plain_bases import plain_bases, plain_factors
from adapterbank.bank.settings import FitSettings
from adapterbank.codec.allocate import Allocation, ModuleStatistics, SideStatistics, allocate, basis_sizes
from adapterbank.codec.entropy import Writer
from adapterbank.codec.predictive import ModuleBasis, coefficient_profile, encode_side_basis
from adapterbank.errors import BankError
from adapterbank.subspace.updates import ThinUpdate

MOST_DIRECTIONS = 256
"""Shared directions a side that the allocation may choose from; more have not paid in any family measured."""
STATISTICS_ADAPTERS = 48
"""Adapters whose spectra decide where the bytes go, evenly spaced over the family."""
BYTES_TOLERANCE = 0.01
"""A bank may be so much smaller than asked before the fit tries again."""
SIZE_ADAPTERS = 16
"""Adapters that are coded to predict the bytes of all, in families of more than twice as many."""
_PRIVATE_CONFIG = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "base_model_name_or_path", "use_rslora"}


@dataclass(frozen=True, kw_only=True)
class Coded:
    """One member as it will be stored."""

    data: bytes
    entry: MemberEntry
    error: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Directions:
    """Leading eigenvectors of both sides of one module, before any coding, with the weighted energy along each."""

    module: ModuleEntry
    V: Tensor
    U: Tensor
    weight_in: np.ndarray
    weight_out: np.ndarray


def fit_bank(
    family: Family,
    settings: FitSettings,
    directory: Path,
    *,
    partial: PartialFit | None = None,
    progress: Progress | None = None,
) -> BankIndex:
    """Fit a bank and write its files, all but the index, into ``directory``.

    Args:
        family: The adapters.
        settings: What is asked for.
        directory: Where the files go.
        partial: A sketch of the family made before (``Bank.partial``); sketched here by default.
        progress: Called as the work goes on.

    Raises:
        BankError: If the target can't be met.
    """
    fit = _Fit(family, settings, directory, progress)
    return fit.predictive(partial) if settings.coding == "predictive" else fit.plain(partial)


class _Fit:
    def __init__(self, family: Family, settings: FitSettings, directory: Path, progress: Progress | None) -> None:
        self.family, self.settings, self.directory = family, settings, directory
        self.modules = [family.modules[name] for name in family.module_names()]
        self.configs = MemberConfigs()
        self.values = sum(family.values(i) for i in range(len(family.adapters)))
        self.report: Progress = progress or (lambda stage, done, total: None)

    # --- predictive coding ----------------------------------------------------------------------------------------------

    def predictive(self, partial: PartialFit | None) -> BankIndex:
        n = len(self.family.adapters)
        directions = self._directions(partial)
        statistics, sampled = self._statistics(directions)
        plan = _Plan(statistics, n, sampled, self.settings.k)
        room = self.settings.bytes(self.values)
        if room is None:
            error = self.settings.error or 1.0
            # aim below: each member is then brought up to the promise by itself
            allocation = plan.for_error(0.98 * error)
            return self._write(directions, allocation, error)
        return self._within(room, plan, directions)

    def _within(self, room: int, plan: "_Plan", directions: list[Directions]) -> BankIndex:
        """The best bank of at most ``room`` bytes: fit, compare with what it really took, fit again."""
        fixed = self._fixed_bytes()
        if room <= fixed:
            raise BankError(
                f"{room} bytes can't hold this bank: its index alone takes about {fixed}; "
                f"ask for more (a ratio of at most {4 * self.values / (fixed * 1.1):.0f})"
            )
        aim, index, sizes = float(room - fixed), None, None
        sampled = len(self.family.adapters) > 2 * SIZE_ADAPTERS
        for attempt in range(8):
            # once the model's bytes are put right, the basis stays: choosing again would move the target
            allocation = plan.for_bits(8 * aim, sizes)
            sizes = allocation.sizes if attempt else None
            if sampled and attempt < 2:
                size = fixed + self._sampled_bytes(directions, allocation)
            else:
                index = self._write(directions, allocation, None)
                size = bank_bytes(index)
                if (1 - BYTES_TOLERANCE) * room < size <= room:
                    return index
            # a hair below the aim, so that the next try ends on the right side
            aim *= min(max((room - fixed) / max(size - fixed, 1), 0.2), 5.0) * 0.998
        if index is None or bank_bytes(index) > room:
            raise BankError(f"no bank of at most {room} bytes was found; the nearest takes {bank_bytes(index)}")
        return index

    def _directions(self, partial: PartialFit | None) -> list[Directions]:
        """Leading eigenvectors per module, from a sketch or from the adapters."""
        found = []
        for done, module in enumerate(self.modules, start=1):
            members = [i for i, a in enumerate(self.family.adapters) if module.name in a.modules]
            rows = sum(self.family.adapters[i].modules[module.name].rank for i in members)
            k = self._most(module, rows, len(members))
            sketch = PartialFit.of_module(self.family, module, rows) if partial is None else partial.module(module)
            found.append(_leading(module, sketch, k))
            self.report("finding shared directions", done, len(self.modules))
        return found

    def _most(self, module: ModuleEntry, rows: int, members: int) -> int:
        bound = min(rows, module.d_in, module.d_out)
        if self.settings.k is not None:
            if self.settings.k > bound:
                raise BankError(
                    f"k={self.settings.k} is more than {module.name} has: {members} adapters of together rank {rows} on a "
                    f"{module.d_in} -> {module.d_out} layer give at most {bound} directions"
                )
            return self.settings.k
        # one adapter shares nothing with anybody
        return min(bound, MOST_DIRECTIONS) if members > 1 else 0

    def _statistics(self, directions: list[Directions]) -> tuple[list[ModuleStatistics], int]:
        n = len(self.family.adapters)
        chosen = [i for i in even_sample(n, STATISTICS_ADAPTERS) if self.family.weight(i) > 0]
        statistics = []
        for done, found in enumerate(directions, start=1):
            updates = [
                (self.family.weight(i), self.family.update(i, found.module.name))
                for i in chosen
                if found.module.name in self.family.adapters[i].modules
            ]
            statistics.append(module_statistics(found, updates))
            self.report("measuring", done, len(directions))
        return statistics, max(len(chosen), 1)

    def _bases(self, directions: list[Directions], allocation: Allocation) -> Tensor:
        writer = Writer()
        for found, sizes, passed in zip(directions, allocation.sizes, allocation.passed_on, strict=True):
            for rows, weight, k, share in (
                (found.V, found.weight_in, sizes[0], passed[0]),
                (found.U, found.weight_out, sizes[1], passed[1]),
            ):
                profile = coefficient_profile(weight[:k])
                encode_side_basis(writer, rows[:k], weight[:k] * share, profile, allocation.slope)
        return pack(writer.finish(), np.zeros(0, dtype=np.uint8))

    def _sampled_bytes(self, directions: list[Directions], allocation: Allocation) -> int:
        """Bytes of basis and members, the latter estimated from a few."""
        payload = self._bases(directions, allocation)
        bases = decode_predictive_bases(payload, self.modules)
        n = len(self.family.adapters)
        sample = even_sample(n, SIZE_ADAPTERS)
        coder = MemberCoder(self.family, self.modules, bases, allocation.slope, None, self.configs)
        taken = sum(coder.code(i).entry.bytes for i in sample)
        return payload.numel() + taken * n // len(sample)

    def _write(self, directions: list[Directions], allocation: Allocation, max_error: float | None) -> BankIndex:
        payload = self._bases(directions, allocation)
        bases = decode_predictive_bases(payload, self.modules)
        coder = MemberCoder(self.family, self.modules, bases, allocation.slope, max_error, self.configs)
        return self._finish(payload, coder.code, allocation.slope)

    # --- plain coding ---------------------------------------------------------------------------------------------------

    def plain(self, partial: PartialFit | None) -> BankIndex:
        bits = 32 if self.settings.coding == "float32" else 16

        def write(k: int) -> BankIndex:
            payload, bases = encode_plain_bases(plain_bases(self.family, self.modules, self.settings, k, partial), bits)
            coder = PlainCoder(self.family, self.modules, bases, bits, self.settings, self.configs)
            return self._finish(payload, coder.code, 0.0)

        if self.settings.k is not None:
            for module in self.modules:  # the error names the rank
                members = [a for a in self.family.adapters if module.name in a.modules]
                if self.settings.method == "product":
                    self._most(module, sum(a.modules[module.name].rank for a in members), len(members))
            return write(self.settings.k)
        room, error = self.settings.bytes(self.values), self.settings.error
        largest = max(sum(a.modules[m.name].rank for a in self.family.adapters if m.name in a.modules) for m in self.modules)

        def too_much(index: BankIndex) -> bool:
            return bank_bytes(index) > room if room is not None else max(m.error for m in index.members.values()) <= (error or 0)

        # bytes grow with k, the error falls with it: the largest k within the bytes, or the smallest within the error
        return _search(write, too_much, largest, keep_first=room is None)

    # --- both -----------------------------------------------------------------------------------------------------------

    def _finish(self, payload: Tensor, code: Callable[[int], Coded], slope: float) -> BankIndex:
        data, digest = store.serialise({"payload": payload})
        store.write_file(self.directory, store.basis_file(digest), data)
        members = {}
        for i, adapter in enumerate(self.family.adapters):
            coded = code(i)
            store.write_file(self.directory, store.member_file(coded.entry.sha256), coded.data)
            members[adapter.name] = coded.entry
            self.report("coding adapters", i + 1, len(self.family.adapters))
        return BankIndex(
            method=self.settings.method,
            coding=self.settings.coding,
            parameters=self.settings.to_json(),
            slope=slope,
            base=self.family.base,
            basis=digest,
            basis_bytes=len(data),
            modules=tuple(self.modules),
            configs=self.configs.all(),
            members=members,
        )

    def _fixed_bytes(self) -> int:
        """Bytes of the index and of file headers, about: what is left is for codes."""
        entry = MemberEntry(
            sha256="0" * 64, source="0" * 16, source_bytes=10**7, values=10**6, bytes=10**5, r=8, alpha=16.0,
            scales=(2.0,), config=0, error=0.123456,
        )  # fmt: skip
        for adapter in self.family.adapters:
            self.configs.index_of(adapter.config)
        index = BankIndex(
            method="product", coding="predictive", parameters=self.settings.to_json(), slope=1e-9, base=self.family.base,
            basis="0" * 64, basis_bytes=10**6, modules=tuple(self.modules), configs=self.configs.all(),
            members={name: entry for name in self.family.names()},
        )  # fmt: skip
        return len(index.to_json()) + 84 * (len(self.family.adapters) + 1)


def _search(
    write: Callable[[int], BankIndex], beyond: Callable[[BankIndex], bool], largest: int, *, keep_first: bool
) -> BankIndex:
    """The last ``k`` before ``beyond`` becomes true, or the first at which it is true (``keep_first``)."""
    low, high, kept = 0, largest + 1, None
    while high - low > 1:
        k = (low + high) // 2
        index = write(k)
        if beyond(index):
            high = k
            kept = index if keep_first else kept
        else:
            low = k
            kept = kept if keep_first else index
    if kept is None:
        raise BankError("no number of components meets the target; ask for a lower ratio or a larger error")
    return kept


class _Plan:
    """The allocation's arguments that stay the same from try to try."""

    def __init__(self, statistics: list[ModuleStatistics], adapters: int, sampled: int, k: int | None) -> None:
        self._arguments = {"adapters": adapters, "sampled": sampled, "fixed_k": k}
        self._statistics = statistics

    def for_bits(self, bits: float, sizes: tuple[tuple[int, int], ...] | None) -> Allocation:
        return allocate(self._statistics, bits=bits, sizes=sizes, **self._arguments)

    def for_error(self, error: float) -> Allocation:
        return allocate(self._statistics, error=error, **self._arguments)


class MemberConfigs:
    """Distinct adapter configs: most members of a bank share one, and JSON is not free."""

    def __init__(self, known: tuple[dict[str, object], ...] = ()) -> None:
        self._known = [dict(c) for c in known]

    def index_of(self, config: object) -> int:
        """Position of a config, appended if it is new."""
        kept = {k: v for k, v in dict(config).items() if k not in _PRIVATE_CONFIG and v not in (None, {}, [], False)}  # type: ignore[call-overload]
        if kept not in self._known:
            self._known.append(kept)
        return self._known.index(kept)

    def all(self) -> tuple[dict[str, object], ...]:
        """All of them, in the order of their positions."""
        return tuple(self._known)


def even_sample(n: int, most: int) -> list[int]:
    """Up to ``most`` of ``n`` indices, evenly spaced."""
    return sorted({int(x) for x in np.linspace(0, n - 1, min(n, most))})


def bank_bytes(index: BankIndex | None) -> int:
    """Bytes of a bank on disk: index, basis and members, task heads apart."""
    if index is None:
        return 0
    return len(index.to_json().encode()) + index.basis_bytes + sum(m.bytes for m in index.members.values())


def _leading(module: ModuleEntry, sketch: "PartialFit.Pair", k: int) -> Directions:
    V, weight_in = sketch[0].basis(k) if k else (torch.zeros(0, module.d_in), torch.zeros(0))
    U, weight_out = sketch[1].basis(k) if k else (torch.zeros(0, module.d_out), torch.zeros(0))
    return Directions(
        module=module, V=V, U=U,
        weight_in=weight_in[:k].double().numpy(), weight_out=weight_out[:k].double().numpy(),
    )  # fmt: skip


def module_statistics(found: Directions, updates: list[tuple[float, ThinUpdate]]) -> ModuleStatistics:
    """How well a module's directions explain its updates, pair by pair."""
    weight = [np.zeros(0)] + [w * u.S.double().numpy() ** 2 for w, u in updates]
    sides = []
    for directions, energy, rows_of in (
        (found.V, found.weight_in, lambda u: u.Vh),
        (found.U, found.weight_out, lambda u: u.U.T),
    ):
        sizes = basis_sizes(len(directions))
        explained = [np.zeros((0, len(sizes)))]
        for _, update in updates:
            energies = (rows_of(update) @ directions.T).double().square().cumsum(dim=1).numpy()
            explained.append(np.pad(energies, ((0, 0), (1, 0)))[:, sizes])
        width = directions.shape[1]
        sides.append(
            SideStatistics(width=width, sizes=sizes, explained=np.concatenate(explained), direction_weight=energy)
        )
    return ModuleStatistics(weight=np.concatenate(weight), side_in=sides[0], side_out=sides[1])


class _Coder:
    """What both codings share: the table, the head tensors and the index entry of a member."""

    def __init__(self, family: Family, modules: list[ModuleEntry], configs: MemberConfigs) -> None:
        self.family, self.modules, self.configs = family, modules, configs

    def slots(self, i: int) -> tuple[list[Slot], tuple[float, ...]]:
        adapter = self.family.adapters[i]
        scales = tuple(sorted(set(adapter.scales.values())))
        slots = [
            Slot(rank=adapter.modules[m.name].rank, scale=scales.index(adapter.scales[m.name]))
            if m.name in adapter.modules
            else Slot(rank=0, scale=0)
            for m in self.modules
        ]
        return slots, scales

    def coded(self, i: int, payload: Tensor, squared_error: float, scales: tuple[float, ...]) -> Coded:
        adapter = self.family.adapters[i]
        bare, _ = store.serialise({"payload": payload})
        extras = {f"extra.{name}": adapter.extra(name).contiguous() for name in adapter.extra_names}
        data, digest = store.serialise({"payload": payload} | extras)
        error = math.sqrt(squared_error)
        entry = MemberEntry(
            sha256=digest,
            source=adapter.source_hash()[:16],
            source_bytes=adapter.source_bytes,
            values=self.family.values(i),
            bytes=len(bare),
            r=adapter.rank,
            alpha=adapter.alpha,
            scales=scales,
            config=self.configs.index_of(adapter.config),
            error=float(f"{error:.6g}"),
        )
        return Coded(data=data, entry=entry, error=error)


class MemberCoder(_Coder):
    """Codes members of a predictive bank: at a slope, or at the largest slope that keeps a promised error."""

    def __init__(
        self,
        family: Family,
        modules: list[ModuleEntry],
        bases: list[ModuleBasis],
        slope: float,
        max_error: float | None,
        configs: MemberConfigs,
    ) -> None:
        super().__init__(family, modules, configs)
        self.bases, self.slope, self.max_error = bases, slope, max_error

    def code(self, i: int) -> Coded:
        """Code member ``i``.

        Raises:
            BankError: If no slope keeps the promise.
        """
        slots, scales = self.slots(i)
        if self.max_error is None:
            return self.coded(i, *self._at(i, slots, self.slope), scales)
        payload, squared = self._promised(i, slots, self.max_error)
        return self.coded(i, payload, squared, scales)

    def _at(self, i: int, slots: list[Slot], slope: float) -> tuple[Tensor, float]:
        return encode_predictive(slots, self._updates(i), self.family.weight(i), slope)

    def _promised(self, i: int, slots: list[Slot], max_error: float) -> tuple[Tensor, float]:
        """The member's own slope: the error grows about with its square root, so a few tries settle it."""
        slope, kept = self.slope, None
        for _ in range(12):
            payload, squared = self._at(i, slots, slope)
            share = math.sqrt(squared) / max_error
            if share <= 1 and (kept is None or payload.numel() < kept[0].numel()):
                kept = (payload, squared)
            if 0.97 <= share <= 1 or (kept is not None and share < 1 and squared == 0):
                break
            if kept is not None and share > 1 and slope < 1.1 * self.slope and kept[1] > (0.9 * max_error) ** 2:
                break
            slope *= min(max((0.985 / max(share, 1e-3)) ** 2, 1e-3), 30.0)
        if kept is None:
            raise BankError(
                f"adapter {self.family.adapters[i].name!r}: an error of {max_error:g} can't be kept; "
                f"{share * max_error:.2g} is the best found, ask for that or use --no-quantize"
            )
        return kept

    def _updates(self, i: int) -> Iterator[tuple[ThinUpdate, ModuleBasis]]:
        present = self.family.adapters[i].modules
        for module, basis in zip(self.modules, self.bases, strict=True):
            if module.name in present:
                yield self.family.update(i, module.name), basis


class PlainCoder(_Coder):
    """Codes members of a plain bank."""

    def __init__(
        self,
        family: Family,
        modules: list[ModuleEntry],
        bases: list[PlainBasis],
        bits: int,
        settings: FitSettings,
        configs: MemberConfigs,
    ) -> None:
        super().__init__(family, modules, configs)
        self.bases, self.bits, self.settings = bases, bits, settings

    def code(self, i: int) -> Coded:
        """Code member ``i``."""
        slots, scales = self.slots(i)
        present = self.family.adapters[i].modules
        parts = [(m.name, b) for m, b in zip(self.modules, self.bases, strict=True) if m.name in present]
        updates = ((*plain_factors(self.family, i, name, self.settings), basis) for name, basis in parts)
        payload, squared = encode_plain(slots, updates, self.family.weight(i), self.bits)
        return self.coded(i, payload, squared, scales)
