"""Training a task from a file of examples: transformers' Trainer, our learning rates, one adapter directory."""

import json
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path

import torch
from transformers.utils import logging

from adapterbank.adapters.names import base_model_id
from adapterbank.training.examples import encoded, labels_of, read_examples, split
from adapterbank.training.method import Method, Tell
from adapterbank.training.models import load_base
from adapterbank.training.run_directory import (
    Scores,
    check_losses,
    check_out,
    finish,
    hash_examples,
    last_checkpoint,
    same_start,
    workplace,
)
from adapterbank.training.trainer import TrainingRun


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """A trained task."""

    out: Path
    task: str
    labels: list[str]
    """In the order of the model's outputs; none for ``causal-lm``."""
    examples: int
    eval_examples: int
    trained: int
    """Values that were trained, the head's among them."""
    head: int
    """Values of the head."""
    bytes: int
    """Of the weights file, the head in it."""
    before: Scores
    after: Scores
    epochs: list[Scores]
    seconds: float


def train(
    method: Method,
    model: str | PathLike[str],
    data: str | PathLike[str],
    out: str | PathLike[str],
    *,
    eval_data: str | PathLike[str] | None = None,
    resume: bool = False,
    progress: Tell | None = None,
) -> TaskResult:
    """Train an adapter and a head, and write them.

    Afterwards ``out`` holds ``adapter_config.json``, ``adapter_model.safetensors`` and, with labels, ``labels.json``.
    While it lasts, ``out/checkpoints`` keeps what ``resume`` needs; a training that fails before its first checkpoint
    leaves nothing.

    Args:
        method: The kind of adapter, with its settings.
        model: Directory or hub id of the base model.
        data: A file with one JSON object a line; see ``FIELDS``.
        out: A new or empty directory.
        eval_data: A file like ``data`` to evaluate on; by default a share of ``data``.
        resume: Continue from the last checkpoint in ``out``, if there is one.
        progress: Told about each stage.

    Raises:
        MissingFileError: If a file isn't there.
        AdapterBankError: If the data, the model or ``out`` can't be used.
    """
    start, data, out, settings = time.monotonic(), Path(data).expanduser(), Path(out).expanduser(), method.settings
    tell = progress or (lambda stage, done, total: None)
    check_out(out, resume=resume)
    examples = read_examples(data, settings.task)
    labels = labels_of(examples, data) if settings.task != "causal-lm" else []
    if eval_data is None:
        examples, held_out = split(examples, settings.eval_share, settings.seed, data)
    else:
        held_out = read_examples(Path(eval_data).expanduser(), settings.task, labels)
    checkpoint = last_checkpoint(out) if resume else None
    with _quiet():
        tell("load model", 0, 1)
        base = load_base(str(model), settings.task, labels, settings.seed)
        most = base.most_tokens(settings.max_tokens)
        torch.manual_seed(settings.seed)
        run = TrainingRun(
            method=method,
            model=method.adapted(base, checkpoint),
            processor=base.processor,
            train=encoded(examples, base.processor, settings.task, labels, most),
            evaluate=encoded(held_out, base.processor, settings.task, labels, most),
            tell=tell,
        )
        tell("load model", 1, 1)
        made_of = {
            **asdict(settings),
            **method.made_of(run.model),
            "model": base_model_id(str(model)),
            "data": hash_examples(examples + held_out),
        }
        if checkpoint is not None:
            before = same_start(out, made_of)
        with workplace(out) as place:
            if checkpoint is None:
                before = run.untrained(place)
                (place / "run.json").write_text(json.dumps({"made_of": made_of, "before": asdict(before)}))
            epochs = run.trained(place, checkpoint)
            check_losses(epochs, place)
            finish(lambda directory: method.save(run.model, directory), out, labels)
    trained = {name: p.numel() for name, p in run.model.named_parameters() if p.requires_grad}
    return TaskResult(
        out=out,
        task=settings.task,
        labels=labels,
        examples=len(examples),
        eval_examples=len(held_out),
        trained=sum(trained.values()),
        head=sum(count for name, count in trained.items() if ".modules_to_save." in name),
        bytes=(out / "adapter_model.safetensors").stat().st_size,
        before=before,
        after=epochs[-1],
        epochs=epochs,
        seconds=round(time.monotonic() - start, 1),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """No tables of fresh weights, no bars: what is worth telling goes to ``tell``."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # PEFT 0.21 still asks transformers 5 for a name that it renamed
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
