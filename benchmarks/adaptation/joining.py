"""A trained task as a member of its bank: how many bytes it takes there, and how good it is when it comes back."""

import tempfile
from pathlib import Path
from typing import Any

from peft import PeftModel

from adapterbank.bank import Bank
from benchmarks.adaptation.subject import Split, Subject
from benchmarks.adaptation.training import evaluate

NAME = "new-task"


def joined(
    subject: Subject, split: Split, model: Any, bank: Path, max_errors: tuple[float, ...]
) -> list[dict[str, Any]]:
    """What the bank holds of a task, for each error that is promised.

    Args:
        subject: The model that is adapted.
        split: Whose test part is asked.
        model: PEFT model of the trained task.
        bank: Directory of the bank; it stays as it is.
        max_errors: Promises, see ``Bank.add``.
    """
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        trained = Path(scratch) / "trained"
        model.save_pretrained(trained, save_embedding_layers=False)
        for max_error in max_errors:
            opened = Bank.load(bank)  # in memory only
            opened.add({NAME: trained}, max_error=max_error)
            restored = Path(scratch) / f"restored-{max_error}"
            opened.export(NAME, restored)
            loss, right = evaluate(subject, PeftModel.from_pretrained(subject.base(split), restored), split.test)
            found.append(
                {
                    "max_error": max_error,
                    "error": opened[NAME].error,
                    "bytes": opened[NAME].bytes,
                    "accuracy": float(right.double().mean()),
                    "test_loss": loss,
                }
            )
    return found
