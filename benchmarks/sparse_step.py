"""Time and memory of training sparse adapters, beside PEFT's LoRA, SHiRA and Super-Tuning."""

import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.processes import run_fresh
from benchmarks.trained import JOBS, SPARSE, adapted, stepper
from benchmarks.training_step import counted_bytes, interleaved


def run(case: Case, seed: int) -> dict[str, Any]:
    """All methods on every model of the case."""
    torch.set_num_threads(1)
    sizes = {"r": case.fields["r"], "density": case.fields["density"]}
    rows = [_row(model, sizes, seed) for model in case.fields["model"]]
    ours = [next(way for way in row["ways"] if way["way"] == "sparse") for row in rows]
    return {
        "title": case.title,
        **sizes,
        "rows": rows,
        "targets": [
            {"name": f"{what} of {row['model']}", "at_most": limit, "reached": reached, "met": reached <= limit}
            for row, way, fields in zip(rows, ours, case.fields["model"], strict=True)
            for what, reached, limit in (
                ("time", way["cpu_share_of_lora"], fields["most_time"]),
                ("counted memory", way["counted_share_of_lora"], fields["most_memory"]),
            )
        ],
    }


def _row(fields: dict[str, Any], sizes: dict[str, Any], seed: int) -> dict[str, Any]:
    job, arguments = fields["job"], fields["arguments"]
    subjects, nobank = {}, Path("none")
    for variant in SPARSE:
        torch.manual_seed(seed)  # one model and one batch for all
        subjects[variant] = JOBS[job](**arguments)
    models = {variant: adapted(variant, subjects[variant], nobank, **sizes) for variant in SPARSE}
    counted = {variant: sum(counted_bytes(models[variant], subjects[variant]).values()) for variant in SPARSE}
    steps = {variant: stepper(models[variant], subjects[variant]) for variant in SPARSE}
    seconds = interleaved(steps, fields["rounds"])
    told = {"subject": job, "arguments": arguments, "sizes": sizes}
    with tempfile.TemporaryDirectory(prefix="adapterbank-bench-") as scratch:
        fresh = {v: run_fresh("train", nobank, Path(scratch), variant=v, **told) for v in SPARSE}
    return {
        "model": fields["name"],
        "rounds": fields["rounds"],
        "ways": [
            {
                "way": variant,
                "trained": sum(p.numel() for p in models[variant].parameters() if p.requires_grad),
                "cpu_seconds": median(seconds[variant]),
                "cpu_share_of_lora": median(a / b for a, b in zip(seconds[variant], seconds["lora"], strict=True)),
                "counted_bytes": counted[variant],
                "counted_share_of_lora": counted[variant] / counted["lora"],
                "peak_mb_above_model": fresh[variant]["peak_mb_above_model"],
            }
            for variant in SPARSE
        ],
    }
