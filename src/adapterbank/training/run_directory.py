"""The directory of a training: checkpoints while it lasts, an adapter at the end, nothing after a failed start."""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterbank.errors import AdapterBankError
from adapterbank.training.examples import Example


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What an evaluation found."""

    loss: float
    accuracy: float
    """Share of the examples; of the tokens for ``causal-lm``."""


def check_out(out: Path, *, resume: bool) -> None:
    """Refuse a directory that something would be lost in.

    Raises:
        AdapterBankError: If it is one, and no training to resume.
    """
    if out.exists() and not out.is_dir():
        raise AdapterBankError(f"{out} is a file; give a new or empty directory")
    if (out / "adapter_config.json").exists():
        raise AdapterBankError(f"{out} holds an adapter already; give a new or empty directory")
    if not out.is_dir() or not any(out.iterdir()) or (resume and (out / "checkpoints" / "run.json").is_file()):
        return
    if last_checkpoint(out) is not None:
        raise AdapterBankError(f"{out} holds an unfinished training; resume it, or give a new or empty directory")
    raise AdapterBankError(f"{out} isn't empty; give a new or empty directory")


def last_checkpoint(out: Path) -> Path | None:
    """The last whole checkpoint of a training, if there is one."""
    found = {
        int(path.name.removeprefix("checkpoint-")): path
        for path in (out / "checkpoints").glob("checkpoint-*")
        # written last
        if path.name.removeprefix("checkpoint-").isdecimal() and (path / "trainer_state.json").is_file()
    }
    return found[max(found)] if found else None


def same_start(out: Path, made_of: dict[str, Any]) -> Scores:
    """Scores that the unfinished training began with.

    Raises:
        AdapterBankError: If it was another training.
    """
    run = json.loads((out / "checkpoints" / "run.json").read_text())
    for name, value in made_of.items():
        if run["made_of"].get(name) != value:
            was = f"{name}={run['made_of'].get(name)}, now it is {value}"
            raise AdapterBankError(f"{out} holds a training with {was}; resume with the same, or begin elsewhere")
    return Scores(**run["before"])


def hash_examples(examples: list[Example]) -> str:
    """Tells one data set from another."""
    return hashlib.sha256(json.dumps(examples, default=lambda path: path.name).encode()).hexdigest()[:16]


@contextmanager
def workplace(out: Path) -> Iterator[Path]:
    """Where checkpoints go; a failure before the first one leaves nothing."""
    place = out / "checkpoints"
    fresh = [path for path in (out, *out.parents) if not path.exists()]
    place.mkdir(parents=True, exist_ok=True)
    try:
        yield place
    except BaseException:
        if last_checkpoint(out) is None:
            shutil.rmtree(place, ignore_errors=True)
            with suppress(OSError):
                for path in fresh:
                    path.rmdir()
        raise


def check_losses(epochs: list[Scores], place: Path) -> None:
    """Refuse a training that diverged.

    Raises:
        AdapterBankError: Naming the epoch; its checkpoints are gone then.
    """
    for number, scores in enumerate(epochs, start=1):
        if not math.isfinite(scores.loss):
            shutil.rmtree(place)  # going on from there is useless
            raise AdapterBankError(f"the loss is no number any more after epoch {number}; use a lower lr or head_lr")


def finish(save: Callable[[str], None], out: Path, labels: list[str]) -> None:
    """Write the adapter, all or nothing, and drop the checkpoints."""
    with tempfile.TemporaryDirectory(dir=out, prefix=".") as scratch:
        save(scratch)
        Path(scratch, "README.md").unlink(missing_ok=True)  # PEFT's empty model card, which names a folder on our disk
        if labels:
            Path(scratch, "labels.json").write_text(json.dumps(labels) + "\n")
        # the config last: with it the directory is an adapter
        for path in sorted(Path(scratch).iterdir(), key=lambda path: path.name == "adapter_config.json"):
            os.replace(path, out / path.name)
    shutil.rmtree(out / "checkpoints")
