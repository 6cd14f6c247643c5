"""Train a task in a bank from a file of examples: transformers' Trainer, our learning rates, one adapter directory."""

import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
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
from adapterbank.bank import Bank
from adapterbank.errors import AdapterBankError, BankError
from adapterbank.tuner.config import EigenLoraConfig
from adapterbank.tuner.examples import (
    IGNORED,
    TASKS,
    encoded,
    labels_of,
    read_examples,
    split,
)
from adapterbank.tuner.gradients import augment
from adapterbank.tuner.live import adapter_config
from adapterbank.tuner.optimizer import COEFFICIENT_LR, HEAD_LR, optimizer_groups
from adapterbank.tuner.run_directory import (
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
_MODELS = {
    "seq-cls": AutoModelForSequenceClassification,
    "causal-lm": AutoModelForCausalLM,
    "image-cls": AutoModelForImageClassification,
}


DIRECTIONS = 16
"""Of the bank and of the gradient by default: together what did best in ``docs/benchmarks/adaptation.md``."""


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """How a task is trained; equal settings and equal data give the same adapter.

    Raises:
        AdapterBankError: If a value is out of range.
    """

    task: str
    """``seq-cls``, ``causal-lm`` or ``image-cls``."""
    r: int = 8
    k: int | None = None
    """Directions of the bank's basis; by default 16, or as many as there are."""
    start: str = "mean"
    """Where the coefficients start; see ``EigenLoraConfig``."""
    epochs: int = 3
    batch: int = 16
    lr: float = COEFFICIENT_LR
    """Of the coefficients."""
    head_lr: float = HEAD_LR
    gradient_directions: int | None = None
    """Directions of the task's own gradient beside the bank's, see ``adapterbank.tuner.augment``; by default 16, none
    in a flat bank."""
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
        for name, least in (("epochs", 1), ("batch", 1), ("gradient_directions", 0), ("max_tokens", 2)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise AdapterBankError(f"{name}={getattr(self, name)} is too small; give at least {least}")
        for name in ("lr", "head_lr"):
            if not 0 < getattr(self, name) < float("inf"):
                raise AdapterBankError(f"{name}={getattr(self, name)} is no learning rate; give a number above 0")


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


def train_task(
    bank: Bank | str | PathLike[str],
    model: str | PathLike[str],
    data: str | PathLike[str],
    out: str | PathLike[str],
    settings: TaskSettings,
    *,
    eval_data: str | PathLike[str] | None = None,
    resume: bool = False,
    progress: Tell | None = None,
) -> TaskResult:
    """Train a task's coefficients and head, and write the adapter.

    Afterwards ``out`` holds ``adapter_config.json``, ``adapter_model.safetensors`` and, with labels, ``labels.json``.
    While it lasts, ``out/checkpoints`` keeps what ``resume`` needs; a training that fails before its first checkpoint
    leaves nothing.

    Args:
        bank: The bank to train in.
        model: Directory or hub id of the bank's base model.
        data: A file with one JSON object a line; see ``FIELDS``.
        out: A new or empty directory.
        settings: How to train.
        eval_data: A file like ``data`` to evaluate on; by default a share of ``data``.
        resume: Continue from the last checkpoint in ``out``, if there is one.
        progress: Told about each stage.

    Raises:
        MissingFileError: If the bank or a file isn't there.
        AdapterBankError: If the data, the model or ``out`` can't be used.
    """
    start, data, out = time.monotonic(), Path(data).expanduser(), Path(out).expanduser()
    tell = progress or (lambda stage, done, total: None)
    check_out(out, resume=resume)
    bank = bank if isinstance(bank, Bank) else Bank.load(Path(bank).expanduser())
    settings = _in_full(settings, bank)
    examples = read_examples(data, settings.task)
    labels = labels_of(examples, data) if settings.task != "causal-lm" else []
    if eval_data is None:
        examples, held_out = split(examples, settings.eval_share, settings.seed, data)
    else:
        held_out = read_examples(Path(eval_data).expanduser(), settings.task, labels)
    checkpoint = last_checkpoint(out) if resume else None
    with _quiet():
        tell("load model", 0, 1)
        base, processor, heads = _load(str(model), settings, labels)
        most = _most_tokens(base, processor, settings)
        run = _Run(
            settings=settings,
            model=_in_bank(base, bank, settings, heads, augmented=checkpoint is not None),
            processor=processor,
            train=encoded(examples, processor, settings.task, labels, most),
            evaluate=encoded(held_out, processor, settings.task, labels, most),
            tell=tell,
        )
        tell("load model", 1, 1)
        made_of = {
            **asdict(settings),
            "model": base_model_id(str(model)),
            "bank": adapter_config(run.model).bank_fingerprint,
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
            finish(run.model, out, labels, bank.index.base or base_model_id(str(model)))
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


# --- model ------------------------------------------------------------------------------------------------------------


def _load(model: str, settings: TaskSettings, labels: list[str]) -> tuple[Any, Any, list[str]]:
    """The base model with a fresh head, its tokenizer or image processor, and what to train beside the adapter."""
    torch.manual_seed(settings.seed)  # the head's start
    names: dict[str, Any] = {}
    if labels:
        names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
        # of another task's head with as many outputs nothing but the size would be right
        names |= {"num_labels": len(labels), "ignore_mismatched_sizes": True}
    images = settings.task == "image-cls"
    try:
        processor: Any = (AutoImageProcessor if images else AutoTokenizer).from_pretrained(model)
        base, info = _MODELS[settings.task].from_pretrained(model, output_loading_info=True, **names)
    except (OSError, ValueError, ImportError) as error:  # ImportError: a tokenizer that needs another package
        reason = str(error).strip().split("\n")[0]
        raise AdapterBankError(f"{model} can't be loaded as a model for {settings.task}: {reason}") from error
    missing = sorted(info["missing_keys"])
    if not labels and missing:
        raise AdapterBankError(f"{model} is no language model: it has no {missing[0]}; train seq-cls with it instead")
    if not images:
        _pad(base, processor, model)
    return base, processor, _heads(base, missing) if labels else []


def _pad(base: Any, tokenizer: Any, model: str) -> None:
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise AdapterBankError(f"{model}: its tokenizer has no token to pad with, and none that ends a text")
        tokenizer.pad_token = tokenizer.eos_token
    # models that read the last token find it by this
    base.config.pad_token_id = tokenizer.pad_token_id


def _most_tokens(base: Any, processor: Any, settings: TaskSettings) -> int:
    limits = (getattr(processor, "model_max_length", None), getattr(base.config, "max_position_embeddings", None))
    return min([settings.max_tokens, *(int(limit) for limit in limits if limit)])


def _in_full(settings: TaskSettings, bank: Bank) -> TaskSettings:
    """With the defaults that depend on the bank."""
    k, gradient = settings.k, settings.gradient_directions
    if gradient is None:
        gradient = 0 if bank.index.method == "flat" else DIRECTIONS
    if k is None and gradient:
        try:
            bank.basis(DIRECTIONS)
            k = DIRECTIONS
        except BankError:
            k = None  # a small bank: all there are
    return replace(settings, k=k, gradient_directions=gradient)


def _in_bank(base: Any, bank: Bank, settings: TaskSettings, heads: list[str], *, augmented: bool) -> Any:
    """The model with a fresh adapter; ``augmented`` makes room for directions that a checkpoint holds."""
    config = EigenLoraConfig(
        bank=bank,
        r=settings.r,
        k=settings.k,
        start=settings.start,
        task_type=TASKS[settings.task],
        modules_to_save=heads or None,
        gradient_directions=(settings.gradient_directions or 0) if augmented else 0,
    )
    torch.manual_seed(settings.seed)
    model: Any = get_peft_model(base, config)
    return model


def _heads(base: Any, missing: list[str]) -> list[str]:
    """What stands beside the model's body or wasn't in its file: of heads, PEFT knows two names only."""
    beside = {name for name, child in base.named_children() if any(True for _ in child.parameters())}
    beside.discard(base.base_model_prefix)
    return sorted(beside | {name.rpartition(".")[0] for name in missing if name.split(".")[0] not in beside})


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class _Run:
    """A model and its data, ready to train."""

    settings: TaskSettings
    model: Any
    processor: Any
    train: Any
    evaluate: Any
    tell: Tell

    def untrained(self, place: Path) -> Scores:
        """Scores of the base model with its fresh head; then the gradient's directions, where they're asked for."""
        trainer = self._trainer(self._arguments(place), (None, None))
        self.tell("evaluate the base model", 0, 1)
        with self.model.disable_adapter():  # the coefficients may start elsewhere
            found = trainer.evaluate()
        self.tell("evaluate the base model", 1, 1)
        if self.settings.gradient_directions:
            seeded = torch.Generator().manual_seed(self.settings.seed)
            loader: Any = DataLoader(
                self.train, self.settings.batch, shuffle=True, generator=seeded, collate_fn=self._collator()
            )
            self.tell("find directions", 0, 1)
            batches = ({name: value.to(trainer.args.device) for name, value in batch.items()} for batch in loader)
            augment(self.model, batches, self.settings.gradient_directions)
            self.tell("find directions", 1, 1)
        return Scores(loss=found["eval_loss"], accuracy=found["eval_accuracy"])

    def trained(self, place: Path, checkpoint: Path | None) -> list[Scores]:
        """Train to the end, from a checkpoint if there is one; scores of every epoch."""
        arguments = self._arguments(place)
        self.model.to(arguments.device)  # before the optimiser sees it
        groups = optimizer_groups(self.model, self.settings.lr, head_lr=self.settings.head_lr)
        optimizer = torch.optim.AdamW(groups)
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
