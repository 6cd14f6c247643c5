"""Where the bytes go: one multiplier for all, and per module the number of shared directions that it pays for."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from adapterbank.codec.cost import PAIR_OVERHEAD, PairCost, SideEnergy, basis_cost, gaussian_cost, pair_cost

LEAST_LOG_SLOPE, MOST_LOG_SLOPE = -70.0, 4.0
"""Range of the slope, as powers of 2: from beyond float32's precision to nothing coded at all."""
SHARING_MARGIN = 0.002
"""Share of its cost a module must save before it gets a basis: less than that is the model's own error."""


def basis_sizes(limit: int) -> list[int]:
    """Numbers of directions to choose from: 0, 1, 2, 3, 4, 6, 8, 12, ... up to ``limit``."""
    sizes = {0, limit}
    for power in range(int(math.log2(max(limit, 1))) + 1):
        sizes |= {s for s in (2**power, 3 * 2**power // 2) if s <= limit}
    return sorted(sizes)


@dataclass(frozen=True, kw_only=True, eq=False)
class SideStatistics:
    """How well the first so many directions of one side explain the unit vectors of a module."""

    width: int
    """``d_in`` or ``d_out``."""
    sizes: list[int]
    """Numbers of directions to choose from, ascending from 0."""
    explained: Float[np.ndarray, "p g"]
    """Energy of each vector in the first ``sizes[g]`` directions."""
    direction_weight: Float[np.ndarray, " k"]
    """Weighted energy of the module along each direction, over all adapters, descending."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ModuleStatistics:
    """The pairs of one module, of all adapters or of an even sample of them."""

    weight: Float[np.ndarray, " p"]
    """Weighted squared singular values: over all modules those of one adapter sum to 1."""
    side_in: SideStatistics
    side_out: SideStatistics


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """What a slope buys."""

    slope: float
    """Weighted squared error that one bit is worth."""
    sizes: tuple[tuple[int, int], ...]
    """Shared directions ``(k_in, k_out)`` of each module."""
    passed_on: tuple[tuple[float, float], ...]
    """Share of the error in a basis direction that reaches the updates, of each side of each module."""
    bits: float
    """Expected bits of bases and adapters."""
    error: float
    """Expected root mean square of the adapters' relative errors."""


def allocate(modules: list[ModuleStatistics], *, adapters: int, **target: Any) -> Allocation:
    """The best of :func:`allocations`."""
    return allocations(modules, adapters=adapters, **target)[0]


def allocations(
    modules: list[ModuleStatistics],
    *,
    adapters: int,
    sampled: int | None = None,
    bits: float | None = None,
    error: float | None = None,
    fixed_k: int | None = None,
    sizes: tuple[tuple[int, int], ...] | None = None,
) -> list[Allocation]:
    """Find the slope at which the expected bits, or the expected error, meets the target.

    Several bases may meet it; those that were looked at come best first. By the model, that is: where two are close,
    only coding them tells which is better.

    Args:
        modules: Statistics of every module.
        adapters: Number of adapters.
        sampled: Number of adapters the statistics come from; all by default.
        bits: Bits there are for bases and adapters; or
        error: Root mean square of the relative errors to reach.
        fixed_k: Exactly so many directions a side instead of the best number; or
        sizes: exactly so many of each side of each module, as in an earlier allocation.

    Raises:
        ValueError: Unless exactly one target is given.
    """
    if (bits is None) == (error is None):
        raise ValueError(f"give bits or error, not both: bits={bits}, error={error}")
    model = _Model(modules, adapters, sampled or adapters)

    def at_target(choice: Int[np.ndarray, "2 m"], guess: float) -> Allocation:
        def excess(log_slope: float) -> float:
            found = model.evaluate(2.0**log_slope, choice)
            if bits is not None:
                return math.log(max(found.bits, 1e-9) / bits)
            return math.log(float(error or 0) / max(found.error, 1e-30))

        return model.evaluate(2.0 ** _root(excess, guess), choice)

    if sizes is not None or fixed_k is not None:
        return [at_target(model.fixed(sizes or ((int(fixed_k or 0),) * 2,) * len(modules)), -20.0)]
    found: list[Allocation] = []
    for choice in (model.private(), model.largest()):
        # sizes follow the slope and the slope follows the sizes; where sharing begins to pay, both ends are stable
        for _ in range(3):
            found.append(at_target(choice, math.log2(found[-1].slope) if found else -20.0))
            choice, before = model.choose(found[-1].slope), choice
            if (choice == before).all():
                break
    return sorted(found, key=lambda a: a.error if bits is not None else a.bits)


def _root(excess: Callable[[float], float], guess: float) -> float:
    """Where a falling function of the slope's logarithm is 0: a bracket around the guess, then false position."""
    low = high = guess
    below = above = excess(guess)
    step = 2.0
    while below < 0 and low > LEAST_LOG_SLOPE:
        low -= step
        below, step = excess(low), 2 * step
    while above > 0 and high < MOST_LOG_SLOPE:
        high += step
        above, step = excess(high), 2 * step
    for _ in range(30):
        if high - low < 1e-3 or below < 0 or above > 0:
            break
        # Illinois: halve the weight of an end that stays, or false position creeps towards it
        middle = min(max(low + (high - low) * below / max(below - above, 1e-300), low + 1e-4), high - 1e-4)
        value = excess(middle)
        if abs(value) < 1e-4:
            return middle
        if value > 0:
            low, below, above = middle, value, above / 2
        else:
            high, above, below = middle, value, below / 2
    return (low + high) / 2


class _Side:
    """One side of all modules in arrays padded to the most candidate sizes (``g``) and directions (``k``)."""

    def __init__(self, sides: list[SideStatistics], module: Int[np.ndarray, " p"]) -> None:
        count = max(len(s.sizes) for s in sides)
        self.module = module
        self.allowed = np.array([[g < len(s.sizes) for g in range(count)] for s in sides])
        self.sizes = np.array([s.sizes + [s.sizes[-1]] * (count - len(s.sizes)) for s in sides], dtype=float)
        self.width = np.array([s.width for s in sides], dtype=float)
        padded = [np.pad(s.explained, ((0, 0), (0, count - len(s.sizes))), mode="edge") for s in sides]
        self.explained = np.concatenate(padded).clip(0, 1)
        most = max(len(s.direction_weight) for s in sides)
        self.direction_weight = np.stack(
            [np.pad(s.direction_weight, (0, most - len(s.direction_weight))) for s in sides]
        )

    def at(self, choice: Int[np.ndarray, " m"]) -> SideEnergy:
        """The parts when each module shares ``sizes[choice]`` directions."""
        sizes, chosen = self.sizes[self.module], choice[self.module]
        bands = np.diff(self.explained, axis=1).clip(min=0)
        used = np.arange(bands.shape[1])[None, :] < chosen[:, None]
        rows = np.arange(len(chosen))
        rest = 1 - self.explained[rows, chosen]
        left = self.width[self.module] - sizes[rows, chosen]
        energy = np.concatenate([np.where(used, bands, 0.0), rest[:, None]], axis=1)
        size = np.concatenate([np.where(used, np.diff(sizes, axis=1), 0.0), left[:, None]], axis=1)
        return SideEnergy(energy=energy, size=np.maximum(size, 1e-9))

    def at_every_size(self, weight: np.ndarray, slope: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Bits, squared error and lost share of the remainder ``(p, g)`` of each vector for every candidate size."""
        sizes = self.sizes[self.module]
        bands, band_size = np.diff(self.explained, axis=1).clip(min=0), np.diff(sizes, axis=1)
        rate, lost = gaussian_cost(bands / np.maximum(band_size, 1e-9), weight[:, None], slope)
        rest, rest_size = 1 - self.explained, self.width[self.module][:, None] - sizes
        rest_rate, rest_lost = gaussian_cost(rest / np.maximum(rest_size, 1e-9), weight[:, None], slope)
        bits = np.pad((rate * band_size).cumsum(axis=1), ((0, 0), (1, 0))) + rest_rate * rest_size
        error = np.pad((lost * bands).cumsum(axis=1), ((0, 0), (1, 0))) + rest_lost * rest
        return bits, np.minimum(error, 1.0), rest_lost

    def shared(self, passed_on: Float[np.ndarray, " m"], size: Float[np.ndarray, " m"], slope: float) -> np.ndarray:
        """Bits and weighted error ``(2, m)`` of each module's first ``size`` directions."""
        used = np.arange(self.direction_weight.shape[1])[None, :] < size[:, None]
        bits, error = basis_cost(self.direction_weight * passed_on[:, None], self.width[:, None], slope)
        return np.stack([np.where(used, bits + PAIR_OVERHEAD, 0).sum(axis=1), np.where(used, error, 0).sum(axis=1)])


class _Model:
    """Expected bits and error of all modules at once; a module's choice is an index into its candidate sizes."""

    def __init__(self, modules: list[ModuleStatistics], adapters: int, sampled: int) -> None:
        self.module = np.repeat(np.arange(len(modules)), [len(m.weight) for m in modules])
        self.weight = np.concatenate([m.weight for m in modules])
        self.scale = adapters / sampled
        self.adapters = adapters
        self.sides = (
            _Side([m.side_in for m in modules], self.module),
            _Side([m.side_out for m in modules], self.module),
        )

    def fixed(self, sizes: tuple[tuple[int, int], ...]) -> Int[np.ndarray, "2 m"]:
        """The choice of exactly these directions, ``(k_in, k_out)`` of each module."""
        wanted = np.array(sizes).T
        return np.stack([np.argmax(s.sizes == k[:, None], axis=1) for s, k in zip(self.sides, wanted, strict=True)])

    def evaluate(self, slope: float, choice: Int[np.ndarray, "2 m"]) -> Allocation:
        """What a slope buys for a choice of basis sizes."""
        bits, error, passed = self._module_costs(slope, choice)
        rows = np.arange(choice.shape[1])
        sizes = [side.sizes[rows, chosen] for side, chosen in zip(self.sides, choice, strict=True)]
        return Allocation(
            slope=slope,
            sizes=tuple((int(a), int(b)) for a, b in zip(*sizes, strict=True)),
            passed_on=tuple((float(a), float(b)) for a, b in zip(*passed, strict=True)),
            bits=float(bits.sum()),
            error=math.sqrt(max(float(error.sum()), 0.0) / max(self.adapters, 1)),
        )

    def private(self) -> Int[np.ndarray, "2 m"]:
        """The choice of no shared direction at all."""
        return np.zeros_like(self.largest())

    def largest(self) -> Int[np.ndarray, "2 m"]:
        """The choice of all directions there are."""
        return np.stack([side.allowed.sum(axis=1) - 1 for side in self.sides])

    def choose(self, slope: float) -> Int[np.ndarray, "2 m"]:
        """The choice that costs each module least at a slope."""
        private, largest = self.private(), self.largest()
        # sharing on one side may pay only once the other side shares: start from both ends
        found = [private, self._descend(private, slope), self._descend(largest, slope)]
        totals = []
        for choice in found:
            bits, error, _ = self._module_costs(slope, choice)
            totals.append(error + slope * bits)
        totals[0] *= 1 - SHARING_MARGIN
        best = np.argmin(totals, axis=0)
        chosen: np.ndarray = np.choose(best[None, :], found)
        return chosen

    def _descend(self, choice: Int[np.ndarray, "2 m"], slope: float) -> Int[np.ndarray, "2 m"]:
        """Improve one side at a time, three times each."""
        for s in (0, 1) * 3:
            choice = choice.copy()
            choice[s] = self._best(s, choice, slope)
        return choice

    def _best(self, s: int, choice: Int[np.ndarray, "2 m"], slope: float) -> Int[np.ndarray, " m"]:
        """The size of side ``s`` that costs each module least, while the other side stays."""
        side, other = self.sides[s], 1 - s
        now = self._pairs(slope, choice)
        bits, error, lost = side.at_every_size(self.weight * (1 - now.side_error[other]), slope)
        pair_bits = bits + now.side_bits[other][:, None] + PAIR_OVERHEAD
        pair_error = self.weight[:, None] * (1 - (1 - error) * (1 - now.side_error[other][:, None]))
        pair = pair_error + slope * pair_bits
        keep = pair < self.weight[:, None]
        pair = np.where(keep, pair, self.weight[:, None])
        cost: np.ndarray = np.full(side.sizes.shape, np.inf)
        for g in range(cost.shape[1]):
            passed = self._passed_on(side.explained[:, g], lost[:, g], keep[:, g])
            shared_bits, shared_error = side.shared(passed, side.sizes[:, g], slope)
            cost[:, g] = self._sum(pair[:, g]) + shared_error + slope * shared_bits
        best: np.ndarray = np.where(side.allowed, cost, np.inf).argmin(axis=1)
        return best

    def _module_costs(
        self, slope: float, choice: Int[np.ndarray, "2 m"]
    ) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"], list[Float[np.ndarray, " m"]]]:
        """Bits and weighted error of each module, bases included, and what its bases pass on (both sides)."""
        cost = self._pairs(slope, choice)
        bits, error, passed = self._sum(cost.bits), self._sum(cost.error), []
        rows = np.arange(choice.shape[1])
        for side, chosen, lost in zip(self.sides, choice, cost.remainder_lost, strict=True):
            explained = side.explained[np.arange(len(self.weight)), chosen[self.module]]
            passed.append(self._passed_on(explained, lost, cost.keep))
            shared_bits, shared_error = side.shared(passed[-1], side.sizes[rows, chosen], slope)
            bits, error = bits + shared_bits, error + shared_error
        return bits, error, passed

    def _pairs(self, slope: float, choice: Int[np.ndarray, "2 m"]) -> PairCost:
        return pair_cost(self.weight, self.sides[0].at(choice[0]), self.sides[1].at(choice[1]), slope)

    def _sum(self, values: Float[np.ndarray, " p"]) -> Float[np.ndarray, " m"]:
        """Sums over each module's pairs, scaled from the sample to all adapters."""
        return self.scale * np.bincount(self.module, values, minlength=len(self.sides[0].sizes))

    def _passed_on(self, explained: np.ndarray, lost: np.ndarray, keep: np.ndarray) -> Float[np.ndarray, " m"]:
        """Share of a basis direction's own error that reaches the updates: coded remainders mend the rest."""
        importance = self.weight * explained * keep
        reaching = importance * np.where(explained < 1, lost, 1.0)
        share: np.ndarray = self._sum(reaching) / np.maximum(self._sum(importance), 1e-300)
        return share.clip(1e-6, 1.0)
