"""One run of the study: a method, a task, a seed. Results are lines of committed files, and are never made twice."""

import datetime
import functools
import hashlib
import importlib.metadata
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers.utils import logging

from benchmarks.adaptation.analytic import projected
from benchmarks.adaptation.joining import joined
from benchmarks.adaptation.methods import Method, build, is_head
from benchmarks.adaptation.results import append, load_results
from benchmarks.adaptation.sources import Recycled, Source
from benchmarks.adaptation.subject import Subject
from benchmarks.adaptation.subjects import SUBJECTS
from benchmarks.adaptation.training import Recipe, evaluate, train
from benchmarks.record import commit, machine, rounded

PACKAGES = ("torch", "peft", "transformers", "numpy")


@dataclass(frozen=True, kw_only=True)
class Run:
    """Equal fields, same result."""

    part: str
    """The file that it belongs to."""
    subject: str
    task: str
    method: Method
    sources: Recycled | None = None
    """Adapters of the bank, for methods that take one, or whose result joins it."""
    seed: int = 0
    examples: int = 320
    steps: int = 80
    join: tuple[float, ...] = ()
    """Errors within which the result joins the bank, to be tested again."""

    @property
    def key(self) -> str:
        """Hash of all fields."""
        fields = asdict(self)
        if not self.join:
            del fields["join"]  # the first lines know nothing of it
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def _start() -> None:
    """In each worker."""
    torch.set_num_threads(1)
    # PEFT 0.21 still asks transformers 5 for a name that it renamed
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    logging.disable_progress_bar()


def execute(run: Run) -> dict[str, Any]:
    """Train, test, measure: what a line of the results holds."""
    start = time.process_time()
    subject = SUBJECTS[run.subject]
    split = subject.split(run.task, train=run.examples, seed=run.seed)
    bank = run.sources.bank() if run.sources is not None else None
    began = time.process_time()
    if run.method.kind == "analytic":
        assert run.sources is not None and bank is not None
        adapter = Source(subject=run.subject, task=run.task, family=run.sources.family).train()
        model, groups = projected(subject, split, adapter, bank, run.method.config["k"]), []
    else:
        model, groups = build(run.method, subject, split, bank, seed=run.seed)
    build_seconds = time.process_time() - began
    done = train(subject, model, groups, split.train, split.validation, Recipe(steps=run.steps, seed=run.seed))
    test_loss, right = evaluate(subject, model, split.test)
    return {
        "accuracy": float(right.double().mean()),
        "test_loss": test_loss,
        "test_examples": len(split.test),
        "validation": [list(point) for point in done.validation],
        # means of tenths of the run: single steps are noise
        "train_loss": [sum(part) / len(part) for part in _tenths(done.train_loss)],
        "trained": _trained(subject, model),
        "stored_bytes": _stored_bytes(subject, model),
        **({"joined": joined(subject, split, model, bank, run.join)} if bank is not None and run.join else {}),
        "step_seconds": done.step_seconds,
        "build_seconds": build_seconds,
        "cpu_seconds": time.process_time() - start,
    }


def _tenths(losses: Sequence[float]) -> Iterable[Sequence[float]]:
    size = max(1, len(losses) // 10)
    return (losses[i : i + size] for i in range(0, len(losses), size))


def _trained(subject: Subject, model: torch.nn.Module) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and not is_head(subject, n))


def _stored_bytes(subject: Subject, model: Any) -> int:
    """Bytes of the saved adapter without its head."""
    if not hasattr(model, "peft_config"):
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch, save_embedding_layers=False)
        tensors = load_file(Path(scratch) / "adapter_model.safetensors")
    return sum(t.nbytes for name, t in tensors.items() if not is_head(subject, name))


def run_all(runs: Sequence[Run], *, workers: int, told: Callable[[str], None]) -> int:
    """Execute what has no line yet and write each line as it comes; how many there were."""
    have = {part: load_results(part) for part in {run.part for run in runs}}
    wanted = list({run.key: run for run in runs if run.key not in have[run.part]}.values())
    told(f"{len(runs)} runs, {len(wanted)} to do")
    start = time.perf_counter()
    for i, (run, result) in enumerate(executed(wanted, workers=workers, told=told), 1):
        append({"key": run.key, **asdict(run), "result": rounded(result), "about": about()})
        told(
            f"{i}/{len(wanted)} {time.perf_counter() - start:.0f} s: {run.part} {run.task} {run.method.name} "
            f"lr {run.method.lr:g} seed {run.seed}: {result['accuracy']:.3f}, "
            f"validation {result['validation'][-1][1]:.3f}, {result['cpu_seconds']:.0f} CPU s"
        )
    return len(wanted)


def executed(runs: Sequence[Run], *, workers: int, told: Callable[[str], None]) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Every run with its result as it comes, ``workers`` at a time."""
    # spawn: torch's thread pool doesn't survive a fork
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start) as pool:
        _prepare(runs, pool, told)
        futures = {pool.submit(execute, run): run for run in runs}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _prepare(wanted: Sequence[Run], pool: ProcessPoolExecutor, told: Callable[[str], None]) -> None:
    """Train and fit first what several runs will ask for, or each worker would make its own."""
    banks = {run.sources: None for run in wanted if run.sources is not None and not run.sources.folder.exists()}
    adapters = {source: None for bank in banks for source in bank.sources if not source.folder.exists()}
    if banks:
        told(f"{len(adapters)} source adapters and {len(banks)} banks to make")
    list(pool.map(Source.train, adapters))
    list(pool.map(Recycled.bank, banks))


@functools.cache
def about() -> dict[str, Any]:
    """Where and with what a line came to be."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
