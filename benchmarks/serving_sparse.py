"""Sparse adapters in one batch: a sparse product for each group of rows, against switching for each group."""

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from adapterbank.runtime import AdapterEngine
from adapterbank.shira import SparseDelta, Switcher, masks
from benchmarks.cases import Case
from benchmarks.served import Way, ratios


def run(case: Case, seed: int) -> dict[str, Any]:
    """Some layers, rows divided among more and more adapters."""
    torch.set_num_threads(1)
    fields = case.fields
    torch.manual_seed(seed)
    layers = (nn.Linear(fields["d"], fields["d"], bias=False) for _ in range(fields["layers"]))
    model = nn.Sequential(*layers).requires_grad_(False)
    most = max(shape["adapters"] for shape in fields["shape"])
    deltas = [_delta(model, f"s{i}", fields["density"], seed + i) for i in range(most)]
    return {
        "title": case.title,
        **{name: fields[name] for name in ("d", "layers", "density", "rows")},
        "shapes": [_shape(model, deltas, shape, fields, seed) for shape in fields["shape"]],
    }


def _delta(model: nn.Module, name: str, density: float, seed: int) -> SparseDelta:
    weights, drawn, tensors = dict(model.named_parameters()), torch.Generator().manual_seed(seed), {}
    for parameter, weight in weights.items():
        positions = masks.rand((weight.shape[0], weight.shape[1]), density, seed=seed, name=parameter)
        tensors[parameter] = positions, 0.01 * torch.randn(len(positions), generator=drawn)
    shapes = {parameter: (weight.shape[0], weight.shape[1]) for parameter, weight in weights.items()}
    return SparseDelta.from_tensors(tensors, shapes, name=name)


def _shape(
    model: nn.Module, deltas: Sequence[SparseDelta], shape: dict[str, int], fields: dict[str, Any], seed: int
) -> dict[str, Any]:
    rows, count = fields["rows"], shape["adapters"]
    x = torch.randn(rows, shape["tokens"], fields["d"])
    served, switched = copy.deepcopy(model), copy.deepcopy(model)
    engine, switcher = AdapterEngine(served), Switcher(switched, {delta.name: delta for delta in deltas[:count]})
    for delta in deltas[:count]:
        engine.add(delta)
        switcher.switch(delta.name)
    groups = _Groups(switched, switcher, x)
    ways: dict[str, Way] = {
        "base": (lambda members: nullcontext(), _step(model, x)),
        "ours": (lambda members: engine.adapters([f"s{i}" for i in members]), _step(served, x)),
        "switching": (groups.use, groups.step),
    }
    drawn = random.Random(seed)
    batches = [drawn.sample([i % count for i in range(rows)], rows) for _ in range(fields["rounds"] + 1)]
    found = ratios(ways, batches, repeats=fields["repeats"], seed=seed)
    engine.close()
    return {**shape, "ways": [{"way": name, **values} for name, values in found.items()]}


class _Groups:
    """Rows of one adapter after another, each group after a switch."""

    def __init__(self, model: nn.Module, switcher: Switcher, x: Tensor) -> None:
        self.model, self.switcher, self.x = model, switcher, x
        self.rows: dict[int, Tensor] = {}

    @contextmanager
    def use(self, members: Sequence[int]) -> Iterator[None]:
        """Set the rows of the next steps."""
        self.rows = {
            i: torch.tensor([row for row, member in enumerate(members) if member == i]) for i in sorted(set(members))
        }
        yield

    def step(self) -> None:
        """All groups."""
        found = torch.empty_like(self.x)
        with torch.no_grad():
            for i, rows in self.rows.items():
                self.switcher.switch(f"s{i}")
                found[rows] = self.model(self.x[rows])


def _step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    def step() -> None:
        with torch.no_grad():
            model(x)

    return step
