"""From a family of adapters to the files of a bank, at the bytes or the error asked for."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor

from adapterbank.bank.coding import decode_predictive_bases, pack
from adapterbank.bank.family import Family, Progress
from adapterbank.bank.index import BankIndex
from adapterbank.bank.members import MemberConfigs, PredictiveCoder
from adapterbank.bank.partial import PartialFit
from adapterbank.bank.plain_fit import fit_plain
from adapterbank.bank.settings import FitSettings
from adapterbank.bank.statistics import Directions, even_sample, find_directions, measure
from adapterbank.bank.writing import HEADER_BYTES, bank_bytes, fixed_bytes, write_bank
from adapterbank.codec.allocate import Allocation, ModuleStatistics, allocations
from adapterbank.codec.entropy import Writer
from adapterbank.codec.predictive import coefficient_profile, encode_side_basis
from adapterbank.errors import BankError

Sizes = tuple[tuple[int, int], ...]
"""Shared directions ``(k_in, k_out)`` of each module."""
BYTES_TOLERANCE = 0.01
"""A bank may be so much smaller than asked before the fit tries again."""
BYTES_TRIES = 8
NEAR = 1.1
"""Bases that are at most so much worse by the model than the best one may be better in truth."""
APART = 0.25
"""What makes another basis worth a try: it has so many fewer or more directions, as a share of the larger one."""
SIZE_ADAPTERS = 16
"""Adapters that are coded to predict the bytes of all, in families of more than twice as many."""


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
    if settings.coding != "predictive":
        return fit_plain(family, settings, directory, partial, progress)
    fit = _PredictiveFit(family, settings, directory, partial, progress)
    room = settings.bytes(sum(family.values(i) for i in range(len(family.adapters))))
    if room is not None:
        return fit.within(room)
    return fit.at(settings.error or 1.0)


class _PredictiveFit:
    """One fit: directions and statistics once, then allocations and codings until the target is met."""

    def __init__(
        self,
        family: Family,
        settings: FitSettings,
        directory: Path,
        partial: PartialFit | None,
        progress: Progress | None,
    ) -> None:
        self.family, self.settings, self.directory, self.progress = family, settings, directory, progress
        self.configs = MemberConfigs()
        self.directions: list[Directions] = find_directions(family, settings.k, partial, progress, settings.seed)
        self.modules = [found.module for found in self.directions]
        self.statistics: list[ModuleStatistics]
        self.statistics, self.sampled = measure(family, self.directions, progress)

    def allocations(
        self, *, bits: float | None = None, error: float | None = None, sizes: Sizes | None = None
    ) -> list[Allocation]:
        """See ``codec.allocate.allocations``."""
        return allocations(
            self.statistics,
            adapters=len(self.family.adapters),
            sampled=self.sampled,
            bits=bits,
            error=error,
            fixed_k=self.settings.k,
            sizes=sizes,
        )

    def at(self, error: float) -> BankIndex:
        """The smallest bank that keeps this error."""
        # aim below: each member is then brought up to the promise by itself
        found = self.allocations(error=0.98 * error)
        best, other = found[0], _rival(found, lambda allocation: allocation.bits)
        if other is not None:
            best = min(best, other, key=lambda a: self._sampled_bytes(a, SIZE_ADAPTERS, max_error=error))
        return self.write(best, error)

    def within(self, room: int) -> BankIndex:
        """The best bank of at most ``room`` bytes.

        Raises:
            BankError: If there is none.
        """
        fixed = fixed_bytes(self.family, self.settings)
        if room <= fixed:
            raise BankError(
                f"{room} bytes can't hold this bank: its index alone takes about {fixed}; ask for more bytes, or fewer "
                "adapters"
            )
        allocated = self.allocations(bits=8.0 * (room - fixed))
        banks = [self._within(room, fixed, allocated[0])]
        if (other := _rival(allocated, lambda allocation: allocation.error)) is not None:
            banks.append(self._within(room, fixed, other, sizes=other.sizes))
        found = [index for index in banks if index is not None]
        if not found:
            raise BankError(f"no bank of at most {room} bytes was found; ask for a lower ratio or a larger budget")
        return min(found, key=_mean_square_error)

    def _within(self, room: int, fixed: int, allocation: Allocation, *, sizes: Sizes | None = None) -> BankIndex | None:
        """Code, compare with the bytes that it really took, code again; with bases of these sizes, or the best ones."""
        aim, best, n = float(room - fixed), None, len(self.family.adapters)
        tried: list[tuple[float, float]] = []
        # tries in which a few adapters tell about all
        previews = 2 if n > 2 * SIZE_ADAPTERS else int(n > SIZE_ADAPTERS // 2)
        for attempt in range(BYTES_TRIES):
            if attempt:
                # once the model's bytes are put right, the basis stays: choosing again would move the target
                allocation = self.allocations(bits=8 * aim, sizes=sizes)[0]
                sizes = allocation.sizes
            if attempt < previews:
                size = fixed + self._sampled_bytes(allocation, min(SIZE_ADAPTERS, max(n // 4, 2)))
            else:
                index = self.write(allocation, None)
                size = bank_bytes(index)
                if size <= room and (best is None or size > bank_bytes(best)):
                    best = index
                # small banks move in steps: what can't be met closely is met less closely
                if best is not None and bank_bytes(best) > (1 - BYTES_TOLERANCE * 1.3**attempt) * room:
                    return best
            if attempt >= max(previews, 1):  # the first try had other sizes, and a preview is no measurement
                tried.append((math.log(aim), math.log(max(size - fixed, 1) / (room - fixed))))
            aim = _next_aim(tried) if tried else aim * min(max((room - fixed) / max(size - fixed, 1), 0.2), 5.0)
        return best

    def write(self, allocation: Allocation, max_error: float | None) -> BankIndex:
        """Code bases and members at an allocation, or members at the promised error."""
        basis = self._basis(allocation)
        coder = self._coder(basis, allocation.slope, max_error)
        return write_bank(self.directory, basis, coder, self.settings, slope=allocation.slope, progress=self.progress)

    def _coder(self, basis: Tensor, slope: float, max_error: float | None) -> PredictiveCoder:
        bases = decode_predictive_bases(basis, self.modules)
        return PredictiveCoder(self.family, self.modules, self.configs, bases=bases, slope=slope, max_error=max_error)

    def _basis(self, allocation: Allocation) -> Tensor:
        """Payload of all bases, each direction as fine as its weight asks for."""
        writer = Writer()
        for found, sizes, passed in zip(self.directions, allocation.sizes, allocation.passed_on, strict=True):
            sides = ((found.V, found.weight_in), (found.U, found.weight_out))
            for (rows, weight), k, share in zip(sides, sizes, passed, strict=True):
                profile = coefficient_profile(weight[:k])
                encode_side_basis(writer, rows[:k], weight[:k] * share, profile, allocation.slope)
        return pack(writer.finish(), np.zeros(0, dtype=np.uint8))

    def _sampled_bytes(self, allocation: Allocation, most: int, *, max_error: float | None = None) -> int:
        """Bytes of basis and members without file headers, the latter estimated from a few."""
        basis = self._basis(allocation)
        coder = self._coder(basis, allocation.slope, max_error)
        n = len(self.family.adapters)
        sample = even_sample(self.family.names(), min(n, most))
        return int(basis.numel()) + sum(coder.code(i).entry.bytes - HEADER_BYTES for i in sample) * n // len(sample)


def _rival(found: list[Allocation], cost: Callable[[Allocation], float]) -> Allocation | None:
    """The next best allocation that shares much less or much more than the best, if the model can't tell them apart."""
    best, *others = found

    def is_apart(other: Allocation) -> bool:
        less, more = sorted(sum(map(sum, allocation.sizes)) for allocation in (best, other))
        return more - less > APART * more

    return next((a for a in others if is_apart(a) and cost(a) <= NEAR * cost(best)), None)


def _mean_square_error(index: BankIndex) -> float:
    return sum(member.error**2 for member in index.members.values()) / len(index.members)


def _next_aim(tried: list[tuple[float, float]]) -> float:
    """Where to aim next, from pairs of log aim and log of bytes taken over bytes allowed.

    Bytes grow about as the aim does; between a try below and one above, the line through both says how.
    """
    wanted = math.log(1 - BYTES_TOLERANCE / 3)
    below = max((t for t in tried if t[1] <= 0), key=lambda t: t[1], default=None)
    above = min((t for t in tried if t[1] > 0), key=lambda t: t[1], default=None)
    if below is None or above is None:
        aim, excess = tried[-1]
        return math.exp(aim - min(max(excess - wanted, -1.6), 1.6))
    share = (wanted - below[1]) / (above[1] - below[1])
    # not the very ends, which were tried
    return math.exp(below[0] + min(max(share, 0.1), 0.9) * (above[0] - below[0]))
