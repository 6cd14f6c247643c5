"""Switching between fused adapters, and what is left of the base model afterwards."""

import copy
import ctypes
import itertools
import random
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, PeftModel, ShiraConfig, SupertuningConfig, get_peft_model
from torch import Tensor, nn

from adapterbank.shira import SparseDelta, SparseUpdate, Switcher, masks
from benchmarks.cases import Case

Ways = dict[str, Callable[[int], None]]
"""By name: switch to the first or to the second adapter."""
Part = tuple[Tensor, Tensor, Tensor]
"""Of one adapter: positions, what the base has there, and what is there with the adapter."""


def run(case: Case, seed: int) -> dict[str, Any]:
    """All ways of switching, at every density and width of the case, and the drift."""
    torch.set_num_threads(1)
    _keep_freed_memory()
    rows = [_row(seed=seed, **fields) for fields in case.fields["row"]]
    first = {way["way"]: way["times_faster_than_lora"] for way in rows[0]["ways"]}
    return {
        "title": case.title,
        "rank": RANK,
        "rows": rows,
        "drift": [_drift(dtype, case.fields["drift_switches"], seed) for dtype in ("float32", "float16", "bfloat16")],
        "targets": [
            {"name": f"{name}, times faster", "at_least": least, "reached": first[name], "met": first[name] >= least}
            for name, least in case.fields["targets"].items()
        ],
    }


def _keep_freed_memory() -> None:
    """Have glibc reuse what was freed: fresh pages for every dense update cost PEFT's LoRA up to three times more, and
    differently in every process.
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, 32 * 2**20)  # no more is allowed


RANK = 32
FLOOR = "the values alone, once"


def _row(*, layers: int, width: int, density: float, rounds: int, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    base = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers))).requires_grad_(False)
    pair = [_delta(base, density, i) for i in range(2)]
    weights = dict(base.named_parameters())
    joined = torch.cat([weights[name].flatten() for name in pair[0].updates])
    ways = _ways(base, pair, density)
    overwriting = {name: switch for name, (_, switch) in overwrites(joined, pair, seed).items()}
    seconds = _in_turns({**ways, **overwriting}, rounds, seed)
    lora, floor = (seconds[name] for name in ("PEFT LoRA", FLOOR))
    return {
        "layers": layers,
        "width": width,
        "density": density,
        "rounds": rounds,
        "ways": [
            {"way": name, "cpu_seconds": seconds[name], "times_faster_than_lora": lora / seconds[name]} for name in ways
        ],
        "overwrites": [
            {"way": name, "cpu_seconds": seconds[name], "over_floor": seconds[name] / (2 * floor)}
            for name in overwriting
        ],
    }


def _in_turns(ways: Ways, rounds: int, seed: int) -> dict[str, float]:
    """Median CPU seconds of each; every round has them in another order."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    order = random.Random(seed)
    for i in range(-1, rounds):
        names = list(ways)
        order.shuffle(names)
        for name in names:
            start = time.process_time()
            ways[name](i % 2)
            if i >= 0:
                seconds[name].append(time.process_time() - start)
    return {name: median(found) for name, found in seconds.items()}


def _ways(base: nn.Sequential, pair: list[SparseDelta], density: float) -> Ways:
    exact = Switcher(copy.deepcopy(base), _named(pair))
    for name in exact.names:
        exact.switch(name)  # opened, and once around
    r = max(1, int(density * len(next(base.parameters())) / 2))
    names = [str(i) for i in range(len(base))]
    return {
        "PEFT LoRA": _peft(base, lambda: LoraConfig(r=RANK, target_modules=names, init_lora_weights=False)),
        "PEFT SHiRA": _peft(base, lambda: ShiraConfig(r=r, target_modules=names, init_weights=False)),
        "Super-Tuning": _peft(
            base, lambda: SupertuningConfig(sparsity=1 - density, target_modules=names, init_weights=False)
        ),
        "LoRA by addmm_": _products(base),
        "copies of all weights": _copies(base, pair),
        "bit-exact": lambda i: exact.switch(f"a{i}"),
        "sums": _sums(base, pair),
        FLOOR: _floor(base, pair),
    }


def _delta(base: nn.Module, density: float, seed: int) -> SparseDelta:
    tensors, weights = {}, dict(base.named_parameters())
    for name, weight in weights.items():
        positions = masks.rand((int(weight.shape[0]), int(weight.shape[1])), density, seed=seed, name=name)
        tensors[name] = positions, 0.01 * torch.randn(len(positions))
    shapes = {name: (int(w.shape[0]), int(w.shape[1])) for name, w in weights.items()}
    return SparseDelta.from_tensors(tensors, shapes, weights=weights)


def _named(deltas: list[SparseDelta]) -> dict[str, Any]:
    return {f"a{i}": delta for i, delta in enumerate(deltas)}


def _peft(base: nn.Module, config: Callable[[], Any]) -> Callable[[int], None]:
    model: Any = get_peft_model(copy.deepcopy(base), config(), adapter_name="a0")
    model.add_adapter("a1", config())
    model.merge_adapter(["a0"])

    def switch(i: int) -> None:
        model.unmerge_adapter()
        model.merge_adapter([f"a{i}"])

    return switch


def _products(base: nn.Module) -> Callable[[int], None]:
    weights = [parameter.clone() for parameter in base.parameters()]
    pairs = [[(torch.randn(len(w), RANK) / 100, torch.randn(RANK, len(w))) for w in weights] for _ in range(2)]
    there = [0]

    @torch.no_grad()
    def switch(i: int) -> None:
        for weight, (B, A), (D, C) in zip(weights, pairs[there[0]], pairs[i], strict=True):
            weight.addmm_(B, A, alpha=-1)
            weight.addmm_(D, C)
        there[0] = i

    return switch


def _copies(base: nn.Module, deltas: list[SparseDelta]) -> Callable[[int], None]:
    model, kept = copy.deepcopy(base), []
    for delta in deltas:
        saved = delta.apply_(model)
        kept.append([parameter.clone() for parameter in model.parameters()])
        delta.restore_(model, saved)

    @torch.no_grad()
    def switch(i: int) -> None:
        for weight, value in zip(model.parameters(), kept[i], strict=True):
            weight.copy_(value)

    return switch


def _sums(base: nn.Module, deltas: list[SparseDelta]) -> Callable[[int], None]:
    """Subtract the one adapter's values, add the other's: drifts, and is what others do."""
    weights = [weight.clone().view(-1) for _, weight in sorted(base.named_parameters())]  # as updates are
    parts = [[(u.positions.long(), u.values) for u in delta.updates.values()] for delta in deltas]
    there = [0]

    def switch(i: int) -> None:
        for flat, (before, minus), (index, plus) in zip(weights, parts[there[0]], parts[i], strict=True):
            flat.scatter_add_(0, before, -minus)
            flat.scatter_add_(0, index, plus)
        there[0] = i

    return switch


def _floor(base: nn.Module, deltas: list[SparseDelta]) -> Callable[[int], None]:
    """One overwrite of the values: a switch needs two."""
    weights = [weight.clone().view(-1) for _, weight in sorted(base.named_parameters())]  # as updates are
    parts = [[(u.positions.long(), u.values) for u in delta.updates.values()] for delta in deltas]

    def switch(i: int) -> None:
        for flat, (index, values) in zip(weights, parts[i], strict=True):
            flat.scatter_(0, index, values)

    return switch


def overwrites(
    weights: Tensor, deltas: list[SparseDelta], seed: int
) -> dict[str, tuple[Tensor, Callable[[int], None]]]:
    """Ways to write back the base's values and then an adapter's: the work of a switch without the rest of it.

    Args:
        weights: Of all layers in one buffer, in the order of the adapters' updates.
        deltas: Of the same layers.
        seed: Of the random order.

    Returns:
        By name: a copy of the weights, since in a common one the ways would find each other's values in the cache; and
        the switch in it.
    """
    updates = [list(delta.updates.values()) for delta in deltas]
    sizes = [update.shape[0] * update.shape[1] for update in updates[0]]
    ascending = [
        [_part(update, layer) for update, layer in zip(of, weights.split(sizes), strict=True)] for of in updates
    ]
    int32 = [[(index.int(), old, new) for index, old, new in parts] for parts in ascending]
    shuffled = [[_shuffled(part, seed) for part in parts] for parts in ascending]
    joined = [_joined(parts, sizes) for parts in ascending]

    def layer_by_layer(buffer: Tensor, parts: list[Part], which: int) -> None:
        for layer, part in zip(buffer.split(sizes), parts, strict=True):
            layer.scatter_(0, part[0].long(), part[which])  # long() of int64 costs nothing

    def at_once(buffer: Tensor, part: Part, which: int) -> None:
        buffer.scatter_(0, part[0], part[which])

    found = {
        "int64 positions, ascending": _switching(weights, ascending, layer_by_layer),
        "int32 positions, widened in each switch": _switching(weights, int32, layer_by_layer),
        "int64 positions, in random order": _switching(weights, shuffled, layer_by_layer),
        "one buffer for all layers, one call": _switching(weights, joined, at_once),
    }
    if find_spec("numba") is not None and len(weights) <= masks.LARGEST_INT32:
        import numba

        compiled = numba.njit(_write)
        arrays = [(index.int().numpy(), old.numpy(), new.numpy()) for index, old, new in joined]
        found["one buffer, one compiled loop, int32 positions"] = _switching(
            weights, arrays, lambda buffer, part, which: compiled(buffer.numpy(), part[0], part[which])
        )
    return found


def _switching(
    weights: Tensor, adapters: list[Any], write: Callable[[Tensor, Any, int], None]
) -> tuple[Tensor, Callable[[int], None]]:
    buffer, there = weights.clone(), [0]

    def switch(i: int) -> None:
        write(buffer, adapters[there[0]], 1)
        write(buffer, adapters[i], 2)
        there[0] = i

    return buffer, switch


def _part(update: SparseUpdate, layer: Tensor) -> Part:
    positions = update.positions.long()
    return positions, layer[positions], layer[positions] + update.values


def _shuffled(part: Part, seed: int) -> Part:
    order = torch.randperm(len(part[0]), generator=torch.Generator().manual_seed(seed))
    return part[0][order], part[1][order], part[2][order]


def _joined(parts: list[Part], sizes: list[int]) -> Part:
    starts = itertools.accumulate(sizes, initial=0)
    positions = torch.cat([part[0] + start for part, start in zip(parts, starts, strict=False)])
    return positions, torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts])


def _write(weights: Any, positions: Any, values: Any) -> None:
    for i in range(len(positions)):
        weights[positions[i]] = values[i]


def _drift(dtype: str, switches: int, seed: int) -> dict[str, Any]:
    """Share of the weights that aren't the base's after so many random switches among ten adapters, and how far off."""
    torch.manual_seed(seed)
    kind = getattr(torch, dtype)
    base = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(4))).requires_grad_(False).to(kind)
    deltas = _named([_delta(base, 0.02, i) for i in range(10)])
    ours, order = copy.deepcopy(base), random.Random(seed)
    switcher = Switcher(ours, deltas)
    lora: Any = None
    for i in range(10):
        config = LoraConfig(r=8, target_modules=["0", "1", "2", "3"], init_lora_weights=False)
        if lora is None:
            lora = get_peft_model(copy.deepcopy(base), config, adapter_name="a0")
        else:
            lora.add_adapter(f"a{i}", config)
    with tempfile.TemporaryDirectory(prefix="adapterbank-bench-") as scratch:
        peft = _peft_shira(base, deltas, Path(scratch))
    for name in (f"a{order.randrange(10)}" for _ in range(switches)):
        switcher.switch(name)
        for model in (lora, peft):
            model.merge_adapter([name])
            model.unmerge_adapter()
    switcher.restore()
    rivals = {"ours": ours, "PEFT LoRA": lora.unload(), "PEFT Super-Tuning": peft.unload()}
    return {
        "dtype": dtype,
        "switches": switches,
        "changed": {name: _changed(base, model) for name, model in rivals.items()},
    }


def _peft_shira(base: nn.Module, deltas: dict[str, SparseDelta], scratch: Path) -> Any:
    from adapterbank.shira import save_as_supertuning

    model: Any = None
    for name, delta in deltas.items():
        save_as_supertuning(delta, scratch / name)
        if model is None:
            model = PeftModel.from_pretrained(copy.deepcopy(base), scratch / name, adapter_name=name)
        else:
            model.load_adapter(scratch / name, adapter_name=name)
    return model


def _changed(base: nn.Module, model: nn.Module) -> dict[str, float]:
    pairs = [(a.flatten(), b.flatten()) for a, b in zip(base.parameters(), model.parameters(), strict=True)]
    one, other = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
    distance: Tensor = (one.float() - other.float()).abs()
    return {"share": float((distance > 0).float().mean()), "most": float(distance.max())}
