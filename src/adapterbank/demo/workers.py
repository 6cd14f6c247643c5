"""The demo's slow parts in worker processes of one thread each: two of those train faster than one with two threads."""

import multiprocessing
import queue
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from adapterbank.adapters import LoraAdapter
from adapterbank.bank import Bank
from adapterbank.demo.curves import Point
from adapterbank.demo.data import load_task
from adapterbank.demo.models import load_classifier, load_tokenizer
from adapterbank.demo.newtask import NewTask, NewTaskRow, train_new_task
from adapterbank.demo.train import TrainSettings, evaluate, train_adapter

J = TypeVar("J")
R = TypeVar("R")
Report = Callable[[float], None]
"""Called by a job with the share of it that is done."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """An adapter on disk and the settings whose test set it is measured on."""

    adapter: Path
    settings: TrainSettings


@dataclass(frozen=True, kw_only=True)
class BankAtRatio:
    """A bank to fit."""

    adapters: list[LoraAdapter]
    ratio: float
    seed: int
    out: Path | None = None
    """Where to save it; without, only what it reaches is of interest."""


def train(settings: TrainSettings, report: Report) -> Path:
    """Job: train one adapter, or find it in the cache."""
    return train_adapter(settings, progress=lambda done, total: report(done / total))


def train_new(job: NewTask, report: Report) -> tuple[NewTaskRow, Path]:
    """Job: train the new task in one way, or find it in the cache."""
    return train_new_task(job, progress=lambda done, total: report(done / total))


def measure(job: Measurement, report: Report) -> float:
    """Job: accuracy of an adapter, loaded into a fresh base model by PEFT and nothing else."""
    from peft import PeftModel

    settings = job.settings
    task = load_task(settings.task, train=settings.examples, test=settings.test_examples)
    model = PeftModel.from_pretrained(load_classifier(len(task.labels)), job.adapter)
    return evaluate(model, load_tokenizer(), task.test, max_tokens=settings.max_tokens)


def fit(job: BankAtRatio, report: Report) -> Point:
    """Job: fit a bank; bytes and error are those of what it writes."""
    bank = Bank.fit(job.adapters, ratio=job.ratio, seed=job.seed, progress=_by_stage(report))
    if job.out is not None:
        bank.save(job.out)
    reached = bank.summary()
    return Point(setting=f"ratio={job.ratio:g}", ratio=reached["ratio"], error=reached["error"])


def _by_stage(report: Report) -> Callable[[str, int, int], None]:
    stages: list[str] = []

    def tell(stage: str, done: int, total: int) -> None:
        if stage not in stages:
            stages.append(stage)
        # how many stages are to come isn't known: each takes half of what is left
        report(1 - 0.5 ** (len(stages) - 1 + done / max(1, total)))

    return tell


def run_jobs(
    function: Callable[[J, Report], R], jobs: Sequence[J], *, progress: Callable[[float, int], None] | None = None
) -> list[R]:
    """Results of ``function(job, report)`` in the order of the jobs, from as many processes as torch would use threads.

    Args:
        function: A module-level function, so that a process can find it by name.
        jobs: What can be pickled.
        progress: Told how many jobs are done, in fractions, and how many there are.
    """
    # spawn, not fork: torch's thread pool doesn't survive a fork
    context = multiprocessing.get_context("spawn")
    reports: Any = context.Queue()
    done = [0.0] * len(jobs)
    with ProcessPoolExecutor(
        max_workers=max(1, min(len(jobs), torch.get_num_threads())),
        mp_context=context,
        initializer=_start,
        initargs=(reports,),
    ) as pool:
        futures = [pool.submit(_run, function, i, job) for i, job in enumerate(jobs)]
        try:
            while not all(future.done() for future in futures):
                for future in futures:
                    if future.done():
                        future.result()  # the first failure ends the run; jobs that haven't begun are dropped
                try:
                    index, share = reports.get(timeout=0.2)
                except queue.Empty:
                    continue
                done[index] = share
                if progress is not None:
                    progress(sum(done), len(jobs))
            return [future.result() for future in futures]
        finally:
            # waits: a process still starting up would print a traceback about the queue that is gone
            pool.shutdown(wait=True, cancel_futures=True)


_reports: Any = None


def _start(reports: Any) -> None:
    global _reports
    _reports = reports
    torch.set_num_threads(1)
    # PEFT 0.21 still asks transformers 5 for a name that it renamed
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def _run(function: Callable[[J, Report], R], index: int, job: J) -> R:
    result = function(job, lambda share: _reports.put((index, share)))
    _reports.put((index, 1.0))
    return result
