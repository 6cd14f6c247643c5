"""One more task, which no adapter of the bank has seen: trained in the bank, as a LoRA, and with its head alone."""

import hashlib
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from adapterbank.bank import Bank
from adapterbank.demo.data import Task
from adapterbank.demo.models import MINILM_ID, load_classifier
from adapterbank.demo.train import Progress, TrainSettings, batches, is_head, peft_model, read_meta, train_model

METHODS = ("bank", "lora", "head")


@dataclass(frozen=True, kw_only=True)
class NewTask:
    """One way to train the new task; equal fields and an equal bank, same result, one cache entry."""

    method: str
    """One of ``METHODS``."""
    bank: Path
    settings: TrainSettings
    """The same for all methods; only the bank's coefficients have a rate of their own."""
    k: int = 16
    """Directions of the bank."""
    gradient_directions: int = 16
    start: str = "mean"
    """Of the coefficients."""
    lr: float = 1e-2

    def recipe(self) -> dict[str, Any]:
        """All that decides how it comes out."""
        common = {"method": self.method, **asdict(self.settings)}
        if self.method != "bank":
            return common
        # the index holds the hash of every file of the bank
        index = hashlib.sha256((self.bank / "bank.json").read_bytes()).hexdigest()
        names = ("k", "gradient_directions", "start", "lr")
        own = {name: getattr(self, name) for name in names}
        return {**common, **own, "bank": index}

    def key(self) -> str:
        """Hash of the recipe; a LoRA's is that of any other adapter with its settings."""
        if self.method == "lora":
            return self.settings.key()
        text = json.dumps([self.settings.key(), self.recipe()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class NewTaskRow:
    """What one way to train the new task gave; the head, which all of them train, is left out of the counts."""

    method: str
    accuracy: float
    trained: int
    """Values that were trained."""
    stored_bytes: int
    """Of the file, without the head's values."""
    bank_bytes: int | None
    """As a member of the bank, for what was trained in it."""
    bank_error: float | None
    """Of the member's update."""


def train_new_task(job: NewTask, *, progress: Progress | None = None) -> tuple[NewTaskRow, Path]:
    """Train the new task in one way, or find it in the cache.

    Returns:
        What it gave, and its directory.
    """

    def make(task: Task, tokenizer: Any) -> tuple[Any, list[dict[str, Any]] | None]:
        if job.method == "lora":
            return peft_model(job.settings, len(task.labels)), None
        torch.manual_seed(0)  # the head's start, as in peft_model
        base = load_classifier(len(task.labels))
        if job.method == "bank":
            return _in_bank(job, base, task, tokenizer)
        for parameter in base.base_model.parameters():
            parameter.requires_grad_(False)
        return base, None

    folder = train_model(make, job.settings, job.recipe(), job.key(), progress=progress)
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights) if weights.exists() else {}
    head = sum(tensor.nbytes for name, tensor in tensors.items() if is_head(name))
    bank_bytes, bank_error = _as_member(job, folder) if job.method == "bank" else (None, None)
    row = NewTaskRow(
        method=job.method,
        accuracy=read_meta(folder)["accuracy"],
        # packed directions of the gradient are no floating-point numbers
        trained=sum(t.numel() for name, t in tensors.items() if t.is_floating_point() and not is_head(name)),
        stored_bytes=weights.stat().st_size - head if tensors else 0,
        bank_bytes=bank_bytes,
        bank_error=bank_error,
    )
    return row, folder


def _in_bank(job: NewTask, base: Any, task: Task, tokenizer: Any) -> tuple[Any, list[dict[str, Any]]]:
    from peft import get_peft_model

    from adapterbank.tuner import EigenLoraConfig, augment, optimizer_groups

    settings = job.settings
    torch.manual_seed(settings.init_seed)
    config = EigenLoraConfig(bank=job.bank, r=settings.r, k=job.k, start=job.start, task_type="SEQ_CLS")
    model = get_peft_model(base, config)
    if job.gradient_directions:
        examples = random.Random(settings.seed).sample(task.train, len(task.train))
        labelled = (
            {**inputs, "labels": labels}
            for inputs, labels in batches(tokenizer, examples, settings.batch, settings.max_tokens)
        )
        augment(model, labelled, job.gradient_directions, head_lr=settings.head_lr)
    config.base_model_name_or_path = MINILM_ID  # PEFT puts the folder that the model was loaded from
    return model, optimizer_groups(model, job.lr, head_lr=settings.head_lr)


def _as_member(job: NewTask, folder: Path) -> tuple[int, float]:
    from adapterbank.tuner import export_lora, load

    model = load(load_classifier(len(read_meta(folder)["labels"])), folder, bank=job.bank)
    bank = Bank.load(job.bank)  # in memory only: the bank of the demo stays as it is
    (name,) = bank.add(export_lora(model, name="new-task"))
    return bank[name].bytes, bank[name].error
