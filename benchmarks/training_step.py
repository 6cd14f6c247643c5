"""Time and memory of a training step, beside PEFT's LoRA."""

import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.processes import run_fresh
from benchmarks.trained import JOBS, VARIANTS, Subject, adapted, stepper, trained_parameters, write_bank

BROUGHT = re.compile(r"\.shared_|\.sparse_positions|\.supertuning_indices")
"""Buffers that adapters bring."""


def run(case: Case, seed: int) -> dict[str, Any]:
    """Both methods on every model of the case."""
    torch.set_num_threads(1)
    sizes = {"k": case.fields["k"], "r": case.fields["r"]}
    rows = [_row(model, sizes, seed) for model in case.fields["model"]]
    reached = {
        "cpu_share_of_lora": max(row["cpu_share_of_lora"] for row in rows),
        "counted_share_of_lora": max(row["counted_share_of_lora"] for row in rows),
    }
    return {
        "title": case.title,
        **sizes,
        "rows": rows,
        "targets": [
            {"name": name, "at_most": limit, "reached": reached[name], "met": reached[name] <= limit}
            for name, limit in case.fields["targets"].items()
        ],
    }


def _row(fields: dict[str, Any], sizes: dict[str, int], seed: int) -> dict[str, Any]:
    job, arguments = fields["job"], fields["arguments"]
    subjects = {}
    for variant in VARIANTS:
        torch.manual_seed(seed)  # one model and one batch for both
        subjects[variant] = JOBS[job](**arguments)
    with tempfile.TemporaryDirectory(prefix="adapterbank-bench-") as scratch:
        bank = write_bank(subjects["bank"].targets, Path(scratch) / "bank", **sizes)
        models = {variant: adapted(variant, subjects[variant], bank, **sizes) for variant in VARIANTS}
        counted = {variant: counted_bytes(models[variant], subjects[variant]) for variant in VARIANTS}
        steps = {variant: stepper(models[variant], subjects[variant]) for variant in VARIANTS}
        seconds = interleaved(steps, fields["pairs"])
        told = {"subject": job, "arguments": arguments, "sizes": sizes}
        fresh = {v: run_fresh("train", bank, Path(scratch), variant=v, **told) for v in VARIANTS}
    shares = [ours / lora for ours, lora in zip(seconds["bank"], seconds["lora"], strict=True)]
    low, _, high = quantiles(shares)
    totals = {variant: sum(parts.values()) for variant, parts in counted.items()}
    return {
        "model": fields["name"],
        "pairs": fields["pairs"],
        "cpu_seconds": {variant: median(seconds[variant]) for variant in VARIANTS},
        "cpu_share_of_lora": median(shares),
        "cpu_share_quartiles": [low, high],
        "counted_bytes": counted,
        "counted_share_of_lora": (totals["bank"] - counted["bank"]["basis"]) / totals["lora"],
        "counted_share_with_basis": totals["bank"] / totals["lora"],
        "peak_mb_above_model": {variant: fresh[variant]["peak_mb_above_model"] for variant in VARIANTS},
        "peak_share_of_lora": fresh["bank"]["peak_mb_above_model"] / fresh["lora"]["peak_mb_above_model"],
    }


def interleaved(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each step, which take turns, and turns at being first; one round before is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(-1, rounds):
        for name in list(steps)[:: 1 if i % 2 else -1]:
            start = time.process_time()
            steps[name]()
            if i >= 0:
                seconds[name].append(time.process_time() - start)
    return seconds


def counted_bytes(model: nn.Module, subject: Subject) -> dict[str, int]:
    """What training holds beside the frozen model: each storage once, wherever it is referred to.

    ``saved`` is what autograd keeps for the backward pass; ``basis`` are the buffers that the adapter brought.
    """
    frozen = {_key(tensor): 0 for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}
    held: list[Tensor] = []  # or the next tensor might lie at the address of one that is gone

    def pack(tensor: Tensor) -> Tensor:
        for part in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):
            if _key(part) not in frozen:
                saved[_key(part)] = part.untyped_storage().nbytes()
                held.append(part)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = subject.loss(model)
    trained = trained_parameters(model)
    optimizer = torch.optim.AdamW(trained, lr=0.0)  # a rate of nothing: whoever counts does not train
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    return {
        "trained": _bytes(trained),
        "optimizer": _bytes(state),
        "saved": sum(saved.values()),
        "basis": _bytes([buffer for name, buffer in model.named_buffers() if BROUGHT.search(name)]),
    }


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(tensors: list[Any]) -> int:
    return sum({_key(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())
