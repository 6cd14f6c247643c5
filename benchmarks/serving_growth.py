"""Thousands of members: the time of a step, of loading and of adding, a working set in random order, and bytes."""

import copy
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from adapterbank.bank import Bank
from adapterbank.runtime import AdapterEngine
from adapterbank.runtime.plan import plan
from benchmarks.cases import Case
from benchmarks.served import BASIS_FROM, Family, engine_of

ADDED = 16
"""Members whose adding is timed."""


def run(case: Case, seed: int) -> dict[str, Any]:
    """All four, with what was aimed at."""
    torch.set_num_threads(1)
    fields = case.fields
    steps = _steps(fields["members"], seed, **fields["step"])
    with tempfile.TemporaryDirectory(prefix="adapterbank-bench-") as scratch:
        stack = _Stack(Path(scratch), seed=seed, **fields["stack"])
        loading, requests = stack.loading(), stack.requests(fields["working_sets"], fields["requests"])
    planned = _planned(seed, **fields["planned"])
    sizes = {name: fields["planned"][name] for name in ("r", "k")}
    added = [_added(seed, **shape, **sizes) for shape in fields["added"]]
    growth = steps[-1]["of_fewest"]
    return {
        "title": case.title,
        **{name: fields[name] for name in ("step", "stack", "planned", "requests")},
        "steps": steps,
        "loading": loading,
        "working_sets": requests,
        "bytes": planned,
        "added": added,
        "targets": [
            _target(f"step at {steps[-1]['members']:,} members over one at {steps[0]['members']}", growth, 1.1),
            _target("seconds to add a member to the decoder's engine", added[0]["seconds"], 0.05),
            _target("seconds to load", max(row["seconds"] for row in loading if row["way"] != "PEFT"), 60),
            _target("planned bytes over measured", planned["planned_over_measured"], 1.05),
        ],
    }


def _target(name: str, reached: float, most: float) -> dict[str, Any]:
    return {"name": name, "at_most": most, "reached": reached, "met": reached <= most}


# --- members ----------------------------------------------------------------------------------------------------------


def _steps(counts: list[int], seed: int, *, d: int, r: int, k: int, rows: int, rounds: int) -> list[dict[str, Any]]:
    """One layer with so many members; other ones in every round, all counts in turns."""
    torch.manual_seed(seed)
    family = Family(layers={"0": (d, d)}, r=r, k=k, seed=seed)
    layer, x = nn.Sequential(nn.Linear(d, d, bias=False)).requires_grad_(False), torch.randn(rows, 1, d)
    engines, adding = {count: engine_of(copy.deepcopy(layer), family, count) for count in counts}, {}
    for count, engine in engines.items():
        new, seconds = [family.adapter(i) for i in range(count, count + ADDED)], []
        for adapter in new:
            start = time.process_time()
            engine.add(adapter)
            seconds.append(time.process_time() - start)
        adding[count] = median(seconds)
    drawn, times = random.Random(seed), {count: list[float]() for count in counts}
    for _ in range(rounds + 1):
        for count in drawn.sample(counts, len(counts)):
            names = [f"a{i}" for i in drawn.sample(range(count), rows)]
            start = time.process_time()
            with engines[count].adapters(names), torch.no_grad():
                engines[count].model(x)
            times[count].append(time.process_time() - start)
    return [
        {
            "members": count,
            "step_seconds": median(times[count][1:]),
            "of_fewest": median(a / b for a, b in zip(times[count][1:], times[counts[0]][1:], strict=True)),
            "add_seconds": adding[count],
        }
        for count in counts
    ]


class _Stack:
    """A model of some layers, a bank of members on disk, and the same members as PEFT directories."""

    def __init__(
        self, folder: Path, *, seed: int, layers: int, d: int, r: int, k: int, members: int, peft: int
    ) -> None:
        self.folder, self.members, self.peft, self.r, self.seed = folder, members, peft, r, seed
        self.family = Family(layers={str(i): (d, d) for i in range(layers)}, r=r, k=k, private=0.1, seed=seed)
        torch.manual_seed(seed)
        self.model = nn.Sequential(*(nn.Linear(d, d, bias=False) for _ in range(layers))).requires_grad_(False)
        self.x = torch.randn(1, 16, d)
        adapters = [self.family.adapter(i) for i in range(members)]
        self.banks = {
            "compact": Bank.fit(adapters, k=k, quantize=False),
            "by ratio": Bank.fit(adapters, ratio=16),
        }
        for name, bank in self.banks.items():
            bank.save(folder / name)
        for adapter in adapters[:peft]:
            adapter.save(folder / "peft" / adapter.name)

    def loading(self) -> list[dict[str, Any]]:
        """All members of each bank, from disk to ready; PEFT with fewer."""
        found = []
        for name in self.banks:
            start = time.process_time()
            engine = AdapterEngine(copy.deepcopy(self.model), self.folder / name)
            engine.load()
            found.append({"way": name, "members": self.members, "seconds": time.process_time() - start})
        start = time.process_time()
        self._peft(self.peft)
        return [*found, {"way": "PEFT", "members": self.peft, "seconds": time.process_time() - start}]

    def _peft(self, count: int) -> Any:
        config = LoraConfig(r=self.r, target_modules=list(self.family.layers), init_lora_weights=False)
        model: Any = get_peft_model(copy.deepcopy(self.model), config, adapter_name="a0")
        for i in range(1, count):
            model.load_adapter(self.folder / "peft" / f"a{i}", adapter_name=f"a{i}")
        return model

    def requests(self, working_sets: list[int], count: int) -> list[dict[str, Any]]:
        """CPU seconds of a request of one row, by the number of members that requests are for, in random order."""
        engine = AdapterEngine(copy.deepcopy(self.model), self.folder / "compact")
        engine.load()
        limit = working_sets[-2] * max(member.bytes for member in engine._members.held)
        limited, mapped = (
            AdapterEngine(copy.deepcopy(self.model), self.folder / "compact", memory=limit, cache=cache)
            for cache in (None, self.folder / "cache")
        )
        mapped.load()
        swapped = self._peft(1)

        def ours(served: AdapterEngine) -> Callable[[int], None]:
            def ask(i: int) -> None:
                with served.adapters([f"a{i}"]):
                    served.model(self.x)

            return ask

        def swap(i: int) -> None:
            hotswap_adapter(swapped, str(self.folder / "peft" / f"a{i % self.peft}"), adapter_name="a0")
            swapped(self.x)

        ways = {
            "in memory": ours(engine),
            "memory for a tenth": ours(limited),
            "the same, with a cache": ours(mapped),
            "PEFT, hot swapping": swap,
        }
        return [
            {"members": size, "seconds": self._asked(ways, size, count, random.Random(self.seed))}
            for size in working_sets
        ]

    def _asked(
        self, ways: dict[str, Callable[[int], None]], size: int, count: int, drawn: random.Random
    ) -> dict[str, float]:
        """Mean seconds of a request, each of them to every way, in turns."""
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        with torch.no_grad():
            for member in [drawn.randrange(size) for _ in range(count)]:
                for name in drawn.sample(list(ways), len(ways)):
                    start = time.process_time()
                    ways[name](member)
                    seconds[name].append(time.process_time() - start)
        # what fits is in memory in the second half
        return {name: fmean(found[count // 2 :]) for name, found in seconds.items()}


def _added(seed: int, *, name: str, layers: int, d: int, r: int, k: int) -> dict[str, Any]:
    """Seconds of adding one to a model of this shape."""
    model, family = _shaped(layers, d, r, k, seed)
    engine, seconds = AdapterEngine(model, family.bank()), []
    for adapter in [family.adapter(i) for i in range(BASIS_FROM, BASIS_FROM + ADDED)]:
        start = time.process_time()
        engine.add(adapter)
        seconds.append(time.process_time() - start)
    return {"name": name, "layers": layers, "d": d, "r": r, "seconds": median(seconds)}


def _shaped(layers: int, d: int, r: int, k: int, seed: int) -> tuple[nn.Module, Family]:
    """A model without weights, and members in the size of its layers."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(d, d, bias=False) for _ in range(layers)))
    return model, Family(layers={str(i): (d, d) for i in range(layers)}, r=r, k=k, seed=seed)


# --- bytes ------------------------------------------------------------------------------------------------------------


def _planned(seed: int, *, layers: int, d: int, r: int, k: int, members: int) -> dict[str, Any]:
    """What was planned against what the engine holds."""
    model, family = _shaped(layers, d, r, k, seed)
    bank = family.bank()
    expected = plan(bank, members=members)
    engine = AdapterEngine(model, bank)
    engine.load()
    for i in range(BASIS_FROM, members):
        engine.add(family.adapter(i))
    report = engine.report()
    measured = report.basis_bytes + report.shared_bytes + report.private_bytes
    return {
        "planned_bytes": expected.bytes,
        "measured_bytes": measured,
        "planned_over_measured": max(expected.bytes / measured, measured / expected.bytes),
        "full_bytes": expected.full_bytes,
    }
