"""Adapters to members: payload, task head and index entry, in either coding."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adapterbank.adapters import LoraAdapter
from adapterbank.bank import store
from adapterbank.bank.coding import Pair, PlainBasis, Slot, encode_plain, encode_predictive
from adapterbank.bank.family import Family
from adapterbank.bank.index import MemberEntry, ModuleEntry, TaskEntry
from adapterbank.bank.settings import FitSettings
from adapterbank.bank.task import TaskCoefficients, coordinates, encode_task
from adapterbank.codec.predictive import ModuleBasis
from adapterbank.errors import BankError
from adapterbank.subspace.eigenlora import canonical
from adapterbank.subspace.updates import ThinUpdate, balanced, thin_svd

PROMISE_SLACK = 0.97
"""A member's error may be so much below the promise before its slope is tried again."""
PROMISE_TRIES = 12
# of a config, what the table and the factors say better, and the base model, which all members share
_TOLD_ELSEWHERE = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "base_model_name_or_path", "use_rslora"}


class UnkeptPromise(BankError):
    """A promised error is beyond what the coding can do."""


@dataclass(frozen=True, kw_only=True)
class Coded:
    """One member as it will be stored."""

    data: bytes
    """Its whole file."""
    entry: MemberEntry


class MemberConfigs:
    """Distinct adapter configs: most members of a bank share one, and JSON is not free."""

    def __init__(self, known: Sequence[Mapping[str, Any]] = ()) -> None:
        self._known = [dict(c) for c in known]

    def index_of(self, adapter: LoraAdapter) -> int:
        """Position of an adapter's config, appended if it is new."""
        told = {key: value for key, value in adapter.config.items() if key not in _TOLD_ELSEWHERE}
        if told.get("target_modules") == list(adapter.modules):
            del told["target_modules"]  # all of them by name, which the table says in a byte each
        kept = {key: value for key, value in told.items() if value not in (None, {}, [], False)}
        if kept not in self._known:
            self._known.append(kept)
        return self._known.index(kept)

    def all(self) -> tuple[dict[str, Any], ...]:
        """All of them, in the order of their positions."""
        return tuple(self._known)


def as_member(
    adapter: LoraAdapter,
    payload: Tensor,
    configs: MemberConfigs,
    *,
    values: int,
    scales: tuple[float, ...],
    error: float,
    task: TaskEntry | None = None,
) -> Coded:
    """A payload with the adapter's task head beside it, and what the index says of it.

    Args:
        adapter: Where head and config come from.
        payload: Its codes.
        configs: The bank's configs, which a new one is added to.
        values: Values of all its A and B.
        scales: The distinct scales of its modules.
        error: Relative error of its update.
        task: Set for a trained task that is stored by its own coefficients.
    """
    bare, _ = store.serialise({"payload": payload})
    extras = {f"extra.{name}": adapter.extra(name).contiguous() for name in adapter.extra_names}
    heads = sum(tensor.numel() * tensor.element_size() for tensor in extras.values())
    data, digest = store.serialise({"payload": payload} | extras)
    entry = MemberEntry(
        sha256=digest,
        source=adapter.source_hash()[:16],
        source_bytes=max(adapter.source_bytes - heads, 0),
        values=values,
        bytes=len(bare),
        r=adapter.rank,
        # a multiplied-out task has scale 1; what it was trained with is in its scales
        alpha=adapter.alpha if task is None else adapter.rank * scales[0],
        scales=scales,
        config=configs.index_of(adapter),
        error=error,
        task=task,
    )
    return Coded(data=data, entry=entry)


def _rounded(squared_error: float) -> float:
    return float(f"{math.sqrt(squared_error):.6g}")


class MemberCoder:
    """Turns the adapters of a family into members; the codings differ in ``payload`` alone."""

    def __init__(self, family: Family, modules: Sequence[ModuleEntry], configs: MemberConfigs) -> None:
        self.family, self.modules, self.configs = family, modules, configs

    def code(self, i: int) -> Coded:
        """Code adapter ``i``.

        Raises:
            BankError: If its promised error can't be kept.
        """
        adapter = self.family.adapters[i]
        scales = tuple(sorted(set(adapter.scales.values())))
        payload, squared_error = self.payload(i, [self._slot(i, m.name, scales) for m in self.modules])
        return as_member(
            adapter, payload, self.configs, values=self.family.values(i), scales=scales, error=_rounded(squared_error)
        )

    def payload(self, i: int, slots: list[Slot]) -> tuple[Tensor, float]:
        """Payload and squared relative error of adapter ``i``."""
        raise NotImplementedError(f"{type(self).__name__} codes nothing; use one of its children")

    def _slot(self, i: int, module: str, scales: tuple[float, ...]) -> Slot:
        adapter = self.family.adapters[i]
        if module not in adapter.modules:
            return Slot(rank=0, scale=0)
        return Slot(rank=adapter.modules[module].rank, scale=scales.index(adapter.scales[module]))


class PredictiveCoder(MemberCoder):
    """Codes at one slope for all, or each member at the largest slope that keeps a promised error.

    Args:
        family: The adapters.
        modules: The bank's modules.
        configs: The bank's configs, which new ones are added to.
        bases: Decoded bases of the modules.
        slope: Weighted squared error that one bit is worth.
        max_error: The promise; none: the slope alone decides.
    """

    def __init__(
        self,
        family: Family,
        modules: Sequence[ModuleEntry],
        configs: MemberConfigs,
        *,
        bases: Sequence[ModuleBasis],
        slope: float,
        max_error: float | None = None,
    ) -> None:
        super().__init__(family, modules, configs)
        self.bases, self.slope, self.max_error = bases, slope, max_error

    def payload(self, i: int, slots: list[Slot]) -> tuple[Tensor, float]:
        """See ``MemberCoder.payload``."""
        if self.max_error is None:
            return self._at(i, slots, self.slope)
        return self._within(i, slots, self.max_error)

    def _within(self, i: int, slots: list[Slot], max_error: float) -> tuple[Tensor, float]:
        """The squared error grows about with the slope, so a few tries bring it just below the promise."""
        slope, low, high = self.slope, 0.0, math.inf  # slopes that kept the promise, and that broke it
        kept, share = None, math.inf
        for _ in range(PROMISE_TRIES):
            payload, squared = self._at(i, slots, slope)
            last, share = share, math.sqrt(squared) / max_error
            if share <= 1:
                low = slope
                kept = payload, squared
                if share >= PROMISE_SLACK or squared == 0:
                    break
            else:
                high = slope
            if high < 1.03 * low:
                break
            slope *= min(max((0.985 / max(share, 1e-3)) ** 2, 1e-3), 30.0)
            if share > 1 and share > 0.98 * last:
                slope /= 4  # a plateau: dropped pairs come back only at a much smaller slope
            if not 1.02 * low < slope < high / 1.02:
                slope = math.sqrt(max(low, 1e-6 * high) * min(high, 1e6 * max(low, 1e-300)))
        if kept is None:
            raise UnkeptPromise(
                f"adapter {self.family.adapters[i].name!r}: an error of {max_error:g} can't be kept, the best found is "
                f"{share * max_error:.4g}; ask for a larger one or turn quantisation off"
            )
        return kept

    def _at(self, i: int, slots: list[Slot], slope: float) -> tuple[Tensor, float]:
        return encode_predictive(slots, self._updates(i), self.family.weight(i), slope)

    def _updates(self, i: int) -> Iterator[tuple[ThinUpdate, ModuleBasis]]:
        present = self.family.adapters[i].modules
        for module, basis in zip(self.modules, self.bases, strict=True):
            if module.name in present:
                yield self.family.update(i, module.name), basis


class TaskCoder(PredictiveCoder):
    """Keeps trained tasks as they are, or codes their coefficients where a promise is given and that takes less.

    Args:
        family: Adapters, the tasks among them.
        modules: The bank's modules.
        configs: The bank's configs, which new ones are added to.
        slope: Where the search for the promise begins.
        max_error: The promise; none: nothing is coded.
        tasks: What the tasks of the family are.
    """

    def __init__(
        self,
        family: Family,
        modules: Sequence[ModuleEntry],
        configs: MemberConfigs,
        *,
        slope: float,
        max_error: float | None,
        tasks: Mapping[LoraAdapter, TaskCoefficients],
    ) -> None:
        super().__init__(family, modules, configs, bases=(), slope=slope, max_error=max_error)
        self.tasks = tasks

    def code(self, i: int) -> Coded:
        """See ``MemberCoder.code``; keeps what can't be coded well enough."""
        adapter, task, values = self.family.adapters[i], self._task(i), self.family.values(i)
        kept = as_member(
            adapter, encode_task(task, self.modules), self.configs, values=values, scales=(task.scale,), error=0.0,
            task=task.entry,
        )  # fmt: skip
        if self.max_error is None:
            return kept
        try:
            payload, squared_error = self.payload(i, [self._slot(i, m.name, (1.0,)) for m in self.modules])
        except UnkeptPromise:
            return kept
        coded = as_member(
            adapter, payload, self.configs, values=values, scales=(task.scale,), error=_rounded(squared_error),
            task=replace(task.entry, core=False, coded=True),
        )  # fmt: skip
        return min(coded, kept, key=lambda member: member.entry.bytes)

    def _task(self, i: int) -> TaskCoefficients:
        return self.tasks[self.family.adapters[i]]

    def _updates(self, i: int) -> Iterator[tuple[ThinUpdate, ModuleBasis]]:
        return coordinates(self._task(i), self.modules)


class PlainCoder(MemberCoder):
    """Codes coefficients as they are, in 16 or 32 bits.

    Args:
        family: The adapters.
        modules: The bank's modules.
        configs: The bank's configs, which new ones are added to.
        bases: Decoded bases of the modules.
        settings: Which method, and how it treats the factors.
    """

    def __init__(
        self,
        family: Family,
        modules: Sequence[ModuleEntry],
        configs: MemberConfigs,
        *,
        bases: Sequence[PlainBasis],
        settings: FitSettings,
    ) -> None:
        super().__init__(family, modules, configs)
        self.bases, self.settings = bases, settings

    def payload(self, i: int, slots: list[Slot]) -> tuple[Tensor, float]:
        """See ``MemberCoder.payload``."""
        return encode_plain(slots, self._updates(i), self.family.weight(i), self.settings.plain_bits)

    def _updates(self, i: int) -> Iterator[tuple[ThinUpdate, Pair, PlainBasis]]:
        present = self.family.adapters[i].modules
        for module, basis in zip(self.modules, self.bases, strict=True):
            if module.name in present:
                yield *plain_factors(self.family, i, module.name, self.settings), basis


def plain_factors(family: Family, i: int, module: str, settings: FitSettings) -> tuple[ThinUpdate, Pair]:
    """Update and factors at scale 1 of one module, in the gauge that the method codes."""
    if settings.method == "product":
        update = family.update(i, module)
        A, B = balanced(update)
        # a rank beyond the layer's own sizes: the table still says r
        missing = family.adapters[i].modules[module].rank - len(A)
        return update, (torch.nn.functional.pad(A, (0, 0, 0, missing)), torch.nn.functional.pad(B, (0, missing)))
    factors = family.adapters[i].factors(module)
    update = thin_svd(factors.A, factors.B, factors.scale)
    if settings.balance:
        return update, canonical(factors.A, factors.B, factors.scale, "balanced")
    # half of the scale into each factor: folded into one, it would count for nothing in the other
    root = abs(factors.scale) ** 0.5
    return update, (root * factors.A, math.copysign(root, factors.scale) * factors.B)
