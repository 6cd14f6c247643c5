"""What the loss of bytes costs a task: accuracy of real adapters before and after the bank."""

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from adapterbank.bank import Bank
from adapterbank.demo.data import Example, load_task
from adapterbank.demo.models import load_classifier, load_tokenizer
from adapterbank.demo.train import TrainSettings, batches
from benchmarks.cases import Case
from benchmarks.families import real, written


def run(case: Case, seed: int) -> dict[str, Any]:
    """Stock PEFT loads each adapter, original and restored; both see the same test texts."""
    # PEFT 0.21 still asks transformers 5 for a name that it renamed
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    name = case.fields["family"]["name"]
    with (
        written(case.fields["family"]) as directories,
        tempfile.TemporaryDirectory(prefix="adapterbank-bench-") as scratch,
    ):
        settings = {path.name: chosen for path, chosen in real(name)}
        before = {path.name: _right(path, settings[path.name]) for path in directories}
        rows = []
        for ratio in case.fields["ratios"]:
            bank = Bank.fit(directories, ratio=ratio, seed=seed)
            after = {}
            for member in bank.names:
                folder = Path(scratch) / f"{ratio:g}" / member
                bank.export(member, folder)
                after[member] = _right(folder, settings[member])
            rows.append(
                {"asked": ratio, "ratio": bank.summary()["ratio"], "error": bank.summary()["error"]}
                | _compare(before, after)
            )
    return {
        "title": case.title,
        "adapters": len(before),
        "test_texts": sum(len(right) for right in before.values()),
        "accuracy_before": _mean(before),
        "rows": rows,
        "by_adapter_before": {member: float(right.mean()) for member, right in before.items()},
    }


@torch.no_grad()
def _right(adapter: Path, settings: TrainSettings) -> torch.Tensor:
    """Which test texts the adapter labels right, as ones and zeros; as the demo's ``evaluate``, text by text."""
    from peft import PeftModel

    task = load_task(settings.task, train=settings.examples, test=settings.test_examples)
    model = PeftModel.from_pretrained(load_classifier(len(task.labels)), adapter).eval()
    examples: Sequence[Example] = sorted(task.test, key=lambda example: len(example[0]))
    return torch.cat(
        [
            (model(**inputs).logits.argmax(-1) == labels).double()
            for inputs, labels in batches(load_tokenizer(), examples, 64, settings.max_tokens)
        ]
    )


def _compare(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> dict[str, Any]:
    changes = [after[member] - before[member] for member in before]
    # of the mean over adapters; test texts are what is random, and pairing takes out how hard each one is
    error = sum(float(change.var() / len(change)) for change in changes) ** 0.5 / len(changes)
    return {
        "accuracy_after": _mean(after),
        "change": sum(float(change.mean()) for change in changes) / len(changes),
        "standard_error_of_change": error,
        "by_adapter_after": {member: float(right.mean()) for member, right in after.items()},
    }


def _mean(right: dict[str, torch.Tensor]) -> float:
    return sum(float(r.mean()) for r in right.values()) / len(right)
