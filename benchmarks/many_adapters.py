"""How long the n-th adapter takes to add to one model, and to activate among all, beside PEFT's LoRA."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.trained import VARIANTS, adapted, config, stack, write_bank

TEN = 10
"""Times are medians of so many adapters, up to the one that is named."""


def run(case: Case, seed: int) -> dict[str, Any]:
    """Each method adds its next adapter in turn, to its own copy of the model; then they switch in turn."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    fields = case.fields
    sizes = {"k": fields["k"], "r": fields["r"]}
    subjects = {v: stack(layers=fields["layers"], width=fields["width"], tokens=1) for v in VARIANTS}
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    switches: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory(prefix="adapterbank-bench-") as scratch:
        # the first adapter makes the layers, so that adding begins with the second
        bank = write_bank(subjects["bank"].targets, Path(scratch) / "bank", **sizes)
        models = {variant: adapted(variant, subjects[variant], bank, **sizes) for variant in VARIANTS}
        for i in range(1, fields["adapters"]):
            for variant, model in models.items():
                new = config(variant, subjects[variant], bank, **sizes)
                seconds[variant].append(_cpu_seconds(lambda m=model, n=i, c=new: m.add_adapter(f"task-{n}", c)))
        for i in range(fields["switches"]):
            for variant, model in models.items():
                name = f"task-{1 + i * (fields['adapters'] - 2) // fields['switches']}"
                switches[variant].append(_cpu_seconds(lambda m=model, n=name: m.set_adapter(n)))
    rows = [{"adapters": n, **{v: median(seconds[v][n - TEN - 1 : n - 1]) for v in VARIANTS}} for n in fields["shown"]]
    measured = {
        v: {"first": rows[0][v], "last": rows[-1][v], "set": median(switches[v]), "all": sum(seconds[v])}
        for v in VARIANTS
    }
    shares = {name: measured["bank"][name] / measured["lora"][name] for name in measured["lora"]}
    return {
        "title": case.title,
        **{name: fields[name] for name in ("adapters", "layers", "width", "k", "r")},
        "cpu_seconds": measured,
        "share_of_lora": shares,
        "targets": [
            {"name": name, "at_most": limit, "reached": shares[key], "met": shares[key] <= limit}
            for name, limit in fields["targets"].items()
            for key in [name.removesuffix("_share_of_lora")]
        ],
        "rows": rows,
    }


def _cpu_seconds(job: Callable[[], Any]) -> float:
    start = time.process_time()
    job()
    return time.process_time() - start
