"""Training a task from a file of examples: transformers' Trainer, our learning rates, one adapter directory."""

import json
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.utils import logging

from adapterbank.adapters.names import base_model_id
from adapterbank.errors import AdapterBankError
from adapterbank.training.examples import (
    IGNORED,
    TASKS,
    encoded,
    labels_of,
    read_examples,
    split,
)
from adapterbank.training.models import BaseModel, load_base
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

Tell = Callable[[str, int, int], None]
"""``tell(stage, done, total)``, as in ``Bank.fit``."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a task is trained, whatever the adapter; equal settings and equal data give the same one.

    Raises:
        AdapterBankError: If a value is out of range.
    """

    task: str
    """``seq-cls``, ``causal-lm`` or ``image-cls``."""
    epochs: int = 3
    batch: int = 16
    lr: float
    """Of the adapter."""
    head_lr: float
    max_tokens: int = 256
    """Longer texts lose their end, longer prompts their beginning."""
    eval_share: float = 0.1
    """Share of the data that is evaluated on instead, where there is no file for that."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise AdapterBankError(f"task={self.task!r} is unknown; choose from {', '.join(TASKS)}")
        if not 0 < self.eval_share < 1:
            raise AdapterBankError(f"eval_share={self.eval_share} is no share; give a number between 0 and 1")
        self.check_least(epochs=1, batch=1, max_tokens=2)
        for name in ("lr", "head_lr"):
            if not 0 < getattr(self, name) < float("inf"):
                raise AdapterBankError(f"{name}={getattr(self, name)} is no learning rate; give a number above 0")

    def check_least(self, **least: int) -> None:
        """Refuse smaller values of some fields; none is none."""
        for name, value in least.items():
            if getattr(self, name) is not None and getattr(self, name) < value:
                raise AdapterBankError(f"{name}={getattr(self, name)} is too small; give at least {value}")


class Method(ABC):
    """What one kind of adapter does in a training."""

    settings: Settings
    looking: str | None
    """The stage in which it looks at the task before training; none if it doesn't."""

    @abstractmethod
    def adapted(self, base: BaseModel, checkpoint: Path | None) -> Any:
        """The PEFT model with a fresh adapter, or with room for what a checkpoint holds."""

    @abstractmethod
    def look(self, model: Any, batches: Iterable[Any], progress: Tell) -> None:
        """Look at the task's gradient before training, and tell how far that is."""

    @abstractmethod
    def optimizer_groups(self, model: Any) -> list[dict[str, Any]]:
        """Parameters with their learning rates."""

    @abstractmethod
    def made_of(self, model: Any) -> dict[str, Any]:
        """What a resumed training must have in common with the one that began, beside settings, model and data."""

    @abstractmethod
    def save(self, model: Any, directory: str) -> None:
        """Write the adapter."""


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
        run = _Run(
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


@dataclass(frozen=True, kw_only=True, eq=False)
class _Run:
    """A model and its data, ready to train."""

    method: Method
    model: Any
    processor: Any
    train: Any
    evaluate: Any
    tell: Tell

    @property
    def settings(self) -> Settings:
        """Of the method."""
        return self.method.settings

    def untrained(self, place: Path) -> Scores:
        """Scores of the base model with its fresh head; then the method looks at the task."""
        trainer = self._trainer(self._arguments(place), (None, None))
        self.tell("evaluate the base model", 0, 1)
        with self.model.disable_adapter():  # the coefficients may start elsewhere
            found = trainer.evaluate()
        self.tell("evaluate the base model", 1, 1)
        if self.method.looking:
            seeded = torch.Generator().manual_seed(self.settings.seed)
            loader: Any = DataLoader(
                self.train, self.settings.batch, shuffle=True, generator=seeded, collate_fn=self._collator()
            )
            self.tell(self.method.looking, 0, 1)
            batches = ({name: value.to(trainer.args.device) for name, value in batch.items()} for batch in loader)
            self.method.look(self.model, batches, self.tell)
            self.tell(self.method.looking, 1, 1)
        return Scores(loss=found["eval_loss"], accuracy=found["eval_accuracy"])

    def trained(self, place: Path, checkpoint: Path | None) -> list[Scores]:
        """Train to the end, from a checkpoint if there is one; scores of every epoch."""
        arguments = self._arguments(place)
        self.model.to(arguments.device)  # before the optimiser sees it
        optimizer = torch.optim.AdamW(self.method.optimizer_groups(self.model))
        steps = self.settings.epochs * -(-len(self.train) // arguments.train_batch_size)
        warmup = max(1, steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
        )
        trainer = self._trainer(arguments, (optimizer, schedule))
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return [
            Scores(loss=entry["eval_loss"], accuracy=entry["eval_accuracy"])
            for entry in trainer.state.log_history
            if "eval_accuracy" in entry
        ]

    def _arguments(self, place: Path) -> TrainingArguments:
        return TrainingArguments(
            output_dir=str(place),
            num_train_epochs=self.settings.epochs,
            per_device_train_batch_size=self.settings.batch,
            per_device_eval_batch_size=self.settings.batch,
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=2,  # while one is written the other is whole
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
            seed=self.settings.seed,
            dataloader_pin_memory=torch.cuda.is_available(),
        )

    def _trainer(self, arguments: TrainingArguments, optimizers: tuple[Any, Any]) -> Any:
        trainer = _Trainer(
            model=self.model,
            args=arguments,
            data_collator=self._collator(),
            train_dataset=self.train,
            eval_dataset=self.evaluate,
            compute_metrics=lambda found: _accuracy(found, is_shifted=self.settings.task == "causal-lm"),
            preprocess_logits_for_metrics=_guesses,
            callbacks=[_Telling(self.tell)],
            optimizers=optimizers,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _collator(self) -> Any:
        if self.settings.task == "image-cls":
            return default_data_collator
        if self.settings.task == "causal-lm":
            return DataCollatorForSeq2Seq(self.processor, label_pad_token_id=IGNORED)
        return DataCollatorWithPadding(self.processor)


class _Trainer(Trainer):
    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # PEFT would ask the hub about the base model, to find out whether its vocabulary has grown
        save = self.model.save_pretrained
        self.model.save_pretrained = lambda *a, **kw: save(*a, **kw, save_embedding_layers=False)
        try:
            super()._save(output_dir, state_dict)
        finally:
            del self.model.save_pretrained


class _Telling(TrainerCallback):
    def __init__(self, tell: Tell) -> None:
        self.tell = tell

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tell("train", state.global_step, state.max_steps)


def _guesses(logits: Any, labels: Any) -> Any:
    # all logits of an evaluation would be the size of the vocabulary times that of the text
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def _accuracy(found: Any, *, is_shifted: bool) -> dict[str, float]:
    guesses, labels = found.predictions, found.label_ids
    if is_shifted:  # the logits of a token are about the next one
        guesses, labels = guesses[:, :-1], labels[:, 1:]
    asked = labels != IGNORED
    return {"accuracy": float((guesses == labels)[asked].mean()) if asked.any() else 0.0}


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
