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
from dataclasses import Field, asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from safetensors.torch import load_file
from transformers.utils import logging

from adapterbank.demo.assets import cache_dir, place
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


class Job(Protocol):
    """What is done once for one line of the results: a dataclass; equal fields, same result."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def part(self) -> str:
        """The file that it belongs to."""
        ...

    @property
    def key(self) -> str:
        """Hash of all fields."""
        ...

    def execute(self) -> dict[str, Any]:
        """What a line of the results holds."""
        ...

    def told(self, result: dict[str, Any]) -> str:
        """The result in a few words."""
        ...


LATER = ("join", "keep", "ends_only")
"""Fields that the first lines know nothing of."""


def key_of(fields: dict[str, Any]) -> str:
    """Hash of a job's fields."""
    known = {name: value for name, value in fields.items() if value or name not in LATER}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A ``Job``: train one method on one task."""

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
    keep: bool = False
    """The adapter stays in the cache for what else is asked of it."""
    ends_only: bool = False
    """The validation loss is taken before and after training only, where nobody draws it by step."""

    @property
    def key(self) -> str:
        """See ``Job``."""
        return key_of(asdict(self))

    @property
    def folder(self) -> Path:
        """Where the adapter lies in the cache, if it is kept."""
        return cache_dir() / "adaptation" / self.subject / f"kept-{self.key}"

    def adapter(self) -> Path:
        """PEFT directory of the adapter that is kept, trained if it isn't there."""
        if not self.folder.exists():
            self.execute()
        return self.folder

    def execute(self) -> dict[str, Any]:
        """Train, test, measure."""
        start = time.process_time()
        subject = SUBJECTS[self.subject]
        split = subject.split(self.task, train=self.examples, seed=self.seed)
        bank = self.sources.bank() if self.sources is not None else None
        began = time.process_time()
        if self.method.kind == "analytic":
            assert self.sources is not None and bank is not None
            adapter = Source(subject=self.subject, task=self.task, family=self.sources.family).train()
            model, groups = projected(subject, split, adapter, bank, **self.method.config), []
        else:
            model, groups = build(self.method, subject, split, bank, seed=self.seed)
        build_seconds = time.process_time() - began
        once = self.keep or self.ends_only
        recipe = Recipe(
            steps=self.steps,
            seed=self.seed,
            evaluate=(1.0,) if once else Recipe.evaluate,
            components=self.method.start.get("components", 0.0),
        )
        done = train(subject, model, groups, split.train, split.validation, recipe)
        if self.keep:
            _keep(model, self.folder)
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
            **({"joined": joined(subject, split, model, bank, self.join)} if bank is not None and self.join else {}),
            "step_seconds": done.step_seconds,
            "build_seconds": build_seconds,
            "cpu_seconds": time.process_time() - start,
        }

    def told(self, result: dict[str, Any]) -> str:
        """See ``Job``."""
        return (
            f"{self.task} {self.method.name} lr {self.method.lr:g} seed {self.seed}: {result['accuracy']:.3f}, "
            f"validation {result['validation'][-1][1]:.3f}"
        )


def _keep(model: Any, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        model.save_pretrained(Path(scratch) / "adapter", save_embedding_layers=False)
        place(Path(scratch) / "adapter", folder)


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


def run_all(runs: Sequence[Job], *, workers: int, told: Callable[[str], None]) -> int:
    """Execute what has no line yet and write each line as it comes; how many there were."""
    have = {part: load_results(part) for part in {run.part for run in runs}}
    wanted = list({run.key: run for run in runs if run.key not in have[run.part]}.values())
    told(f"{len(runs)} runs, {len(wanted)} to do")
    start = time.perf_counter()
    for i, (run, result) in enumerate(executed(wanted, workers=workers, told=told), 1):
        append({"key": run.key, **asdict(run), "result": rounded(result), "about": about()})
        told(
            f"{i}/{len(wanted)} {time.perf_counter() - start:.0f} s: {run.part} {run.told(result)}, "
            f"{result['cpu_seconds']:.0f} CPU s"
        )
    return len(wanted)


def executed(runs: Sequence[Job], *, workers: int, told: Callable[[str], None]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Every run with its result as it comes, ``workers`` at a time."""
    # spawn: torch's thread pool doesn't survive a fork
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start) as pool:
        _prepare([run for run in runs if isinstance(run, Run)], pool, told)
        futures = {pool.submit(run.execute): run for run in runs}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _start() -> None:
    """In each worker."""
    torch.set_num_threads(1)
    # PEFT 0.21 still asks transformers 5 for a name that it renamed
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    logging.disable_progress_bar()


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
