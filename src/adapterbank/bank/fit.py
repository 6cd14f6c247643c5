"""From a family of adapters to the files of a bank, at the bytes or the error asked for."""

import math
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
from adapterbank.codec.allocate import Allocation, ModuleStatistics, allocate
from adapterbank.codec.entropy import Writer
from adapterbank.codec.predictive import coefficient_profile, encode_side_basis
from adapterbank.errors import BankError

BYTES_TOLERANCE = 0.01
"""A bank may be so much smaller than asked before the fit tries again."""
BYTES_TRIES = 8
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
    error = settings.error or 1.0
    # aim below: each member is then brought up to the promise by itself
    return fit.write(fit.allocation(error=0.98 * error), error)


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

    def allocation(
        self,
        *,
        bits: float | None = None,
        error: float | None = None,
        sizes: tuple[tuple[int, int], ...] | None = None,
    ) -> Allocation:
        """See ``codec.allocate``."""
        return allocate(
            self.statistics,
            adapters=len(self.family.adapters),
            sampled=self.sampled,
            bits=bits,
            error=error,
            fixed_k=self.settings.k,
            sizes=sizes,
        )

    def within(self, room: int) -> BankIndex:
        """The best bank of at most ``room`` bytes: code, compare with what it really took, code again.

        Raises:
            BankError: If there is none.
        """
        fixed = fixed_bytes(self.family, self.settings)
        if room <= fixed:
            raise BankError(
                f"{room} bytes can't hold this bank: its index alone takes about {fixed}; ask for more bytes, or fewer "
                "adapters"
            )
        aim, sizes, best, n = float(room - fixed), None, None, len(self.family.adapters)
        tried: list[tuple[float, float]] = []
        # tries in which a few adapters tell about all
        previews = 2 if n > 2 * SIZE_ADAPTERS else int(n > SIZE_ADAPTERS // 2)
        for attempt in range(BYTES_TRIES):
            # once the model's bytes are put right, the basis stays: choosing again would move the target
            allocation = self.allocation(bits=8 * aim, sizes=sizes)
            sizes = allocation.sizes if attempt else None
            if attempt < previews:
                size = fixed + self._sampled_bytes(allocation)
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
        if best is None:
            raise BankError(f"no bank of at most {room} bytes was found; ask for a lower ratio or a larger budget")
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

    def _sampled_bytes(self, allocation: Allocation) -> int:
        """Bytes of basis and members without file headers, the latter estimated from a few."""
        basis = self._basis(allocation)
        coder = self._coder(basis, allocation.slope, None)
        n = len(self.family.adapters)
        sample = even_sample(self.family.names(), min(SIZE_ADAPTERS, max(n // 4, 2)))
        return int(basis.numel()) + sum(coder.code(i).entry.bytes - HEADER_BYTES for i in sample) * n // len(sample)


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
