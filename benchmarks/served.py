"""What the benchmarks of serving have in common: families that share their directions, and rivals."""

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from adapterbank.adapters import LoraAdapter, LoraFactors
from adapterbank.bank import Bank
from adapterbank.runtime import AdapterEngine

BASIS_FROM = 8
"""Members that the bank is fitted on; the others lie in the same directions and are added to the engine."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Adapters of some layers that share ``k`` directions a side, but for a share of their energy."""

    layers: Mapping[str, tuple[int, int]]
    """``(d_in, d_out)`` by name."""
    r: int
    k: int
    private: float = 0.0
    """Size of what each has for itself, against what is shared."""
    seed: int = 0

    def adapter(self, i: int) -> LoraAdapter:
        """The ``i``-th, always the same one."""
        drawn = torch.Generator().manual_seed(1000 * self.seed + i)
        factors = {}
        for name, (V, U) in self._bases().items():
            A = torch.randn(self.r, self.k, generator=drawn) @ V
            B = U.T @ torch.randn(self.k, self.r, generator=drawn)
            A += self.private * (self.k / A.shape[1]) ** 0.5 * torch.randn(A.shape, generator=drawn)
            B += self.private * (self.k / len(B)) ** 0.5 * torch.randn(B.shape, generator=drawn)
            factors[name] = LoraFactors(A=A / self.k**0.5, B=B / (100 * self.k**0.5), scale=1.0)
        return LoraAdapter.from_factors(f"a{i}", factors)

    def _bases(self) -> dict[str, tuple[Tensor, Tensor]]:
        if "found" not in _KEPT.get(self, {}):
            drawn = torch.Generator().manual_seed(self.seed)
            found = {
                name: tuple(torch.linalg.qr(torch.randn(d, self.k, generator=drawn)).Q.T.contiguous() for d in sizes)
                for name, sizes in self.layers.items()
            }
            _KEPT[self] = {"found": found}
        bases: dict[str, Any] = _KEPT[self]["found"]
        return bases

    def __hash__(self) -> int:
        return hash((tuple(self.layers.items()), self.r, self.k, self.private, self.seed))

    def bank(self) -> Bank:
        """Of the first members, with their directions stored."""
        return Bank.fit([self.adapter(i) for i in range(BASIS_FROM)], k=self.k, quantize=False)


_KEPT: dict[Family, dict[str, Any]] = {}


def engine_of(model: nn.Module, family: Family, members: int, **options: Any) -> AdapterEngine:
    """An engine that holds so many members."""
    engine = AdapterEngine(model, family.bank(), **options)
    engine.load()
    for i in range(BASIS_FROM, members):
        engine.add(family.adapter(i))
    return engine


class Gathered:
    """Rows with adapters of their own as others do it: factors of each row are copied together, then multiplied."""

    def __init__(self, model: nn.Module, family: Family, members: int) -> None:
        adapters = [family.adapter(i) for i in range(members)]
        self.which = torch.zeros(0, dtype=torch.int64)
        for name in family.layers:
            found = [adapter.factors(name) for adapter in adapters]
            A, B = torch.stack([f.A for f in found]), torch.stack([f.B for f in found])
            model.get_submodule(name).register_forward_hook(self._hook(A, B))

    def _hook(self, A: Tensor, B: Tensor) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def hook(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
            x = args[0].reshape(len(self.which), -1, args[0].shape[-1])
            return output + (x @ A[self.which].mT @ B[self.which].mT).view(output.shape)

        return hook

    def use(self, members: Sequence[int]) -> AbstractContextManager[None]:
        """Set the rows of the next forwards."""
        self.which = torch.tensor(members)
        return nullcontext()


Way = tuple[Callable[[Sequence[int]], AbstractContextManager[Any]], Callable[[], Any]]
"""How a batch's members are set, and one step."""


def ratios(
    ways: Mapping[str, Way], batches: Iterable[Sequence[int]], *, repeats: int, seed: int
) -> dict[str, dict[str, float]]:
    """CPU seconds of a step and of setting its members, and ratios to ``base``; ways take turns in every round."""
    order = random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    setting: dict[str, list[float]] = {name: [] for name in ways}
    for number, members in enumerate(batches):
        names = list(ways)
        order.shuffle(names)
        for name in names:
            use, step = ways[name]
            start = time.process_time()
            with use(members):
                entered = time.process_time()
                step()  # once to warm up
                begun = time.process_time()
                for _ in range(repeats):
                    step()
                ended = time.process_time()
            if number:  # the first round is everybody's warm-up
                seconds[name].append((ended - begun) / repeats)
                setting[name].append(entered - start)
    return {
        name: {
            "cpu_seconds": median(found),
            "of_base": median(a / b for a, b in zip(found, seconds["base"], strict=True)),
            "setting_seconds": median(setting[name]),
        }
        for name, found in seconds.items()
    }
