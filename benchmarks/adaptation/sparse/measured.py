"""What is asked of trained adapters: several of them in one model, or one at another strength."""

import time
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

from adapterbank.adapters import LoraAdapter
from adapterbank.shira import SparseDelta, fuse, interference
from adapterbank.shira.convert import from_lora
from benchmarks.adaptation.runs import Run, key_of
from benchmarks.adaptation.subjects import SUBJECTS
from benchmarks.adaptation.training import evaluate

ALPHAS = tuple(i / 8 for i in range(11))
"""0 to 1.25."""


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """A ``Job``: one adapter a task, added up; every task is asked through its own head, before and after."""

    name: str
    adapters: tuple[Run, ...]
    seed: int
    part: str = "sparse-fusion"

    @property
    def key(self) -> str:
        """See ``Job``."""
        return key_of(asdict(self))

    def execute(self) -> dict[str, Any]:
        """Accuracies by task, and how much each pair is in each other's way."""
        start = time.process_time()
        deltas = {run.task: delta_of(run) for run in self.adapters}
        together = fuse(deltas)
        return {
            "tasks": {
                run.task: {"single": _tested(run, own, own), "fused": _tested(run, together, own)}
                for run, own in zip(self.adapters, deltas.values(), strict=True)
            },
            "pairs": [
                {"tasks": list(pair), **asdict(interference(*(deltas[task] for task in pair)))}
                for pair in combinations(deltas, 2)
            ],
            "cpu_seconds": time.process_time() - start,
        }

    def told(self, result: dict[str, Any]) -> str:
        """See ``Job``."""
        accuracies = (
            f"{task} {found['single']['accuracy']:.3f} to {found['fused']['accuracy']:.3f}"
            for task, found in result["tasks"].items()
        )
        return f"{self.name} seed {self.seed}: {', '.join(accuracies)}"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A ``Job``: ``W + alpha * S`` for one trained adapter, from the base model to more than was trained."""

    adapter: Run
    alphas: tuple[float, ...] = ALPHAS
    part: str = "sparse-strength"

    @property
    def key(self) -> str:
        """See ``Job``."""
        return key_of(asdict(self))

    def execute(self) -> dict[str, Any]:
        """Loss and accuracy by strength; and of the base model, which nothing was applied to."""
        start = time.process_time()
        delta = delta_of(self.adapter)
        return {
            "base": _tested(self.adapter, replace(delta, updates={}), delta),
            "points": [{"alpha": alpha, **_tested(self.adapter, delta, delta, alpha=alpha)} for alpha in self.alphas],
            "cpu_seconds": time.process_time() - start,
        }

    def told(self, result: dict[str, Any]) -> str:
        """See ``Job``."""
        losses = (f"{point['test_loss']:.3f}" for point in result["points"])
        return f"{self.adapter.task} {self.adapter.method.name}: {' '.join(losses)}"


def delta_of(run: Run) -> SparseDelta:
    """The run's adapter with its head; of a LoRA every entry of its update."""
    folder = run.adapter()
    if run.method.kind == "LoraConfig":
        delta, _ = from_lora(LoraAdapter.load(folder, name=run.task), density=1.0)
        return delta
    return SparseDelta.load(folder, name=run.task)


def _tested(run: Run, delta: SparseDelta, own: SparseDelta, *, alpha: float = 1.0) -> dict[str, float]:
    """Apply a delta to the base model and test it on the run's task, with the head of the run's own adapter."""
    subject = SUBJECTS[run.subject]
    split = subject.split(run.task, train=run.examples, seed=run.seed)
    model = subject.base(split)
    delta.apply_(model, alpha=alpha)
    model.load_state_dict(dict(own.extras), strict=False)
    test_loss, right = evaluate(subject, model, split.test)
    return {"test_loss": test_loss, "accuracy": float(right.double().mean())}
