"""A task in a bank: coefficients on its basis and on directions of the task's gradient, and a head."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from peft import get_peft_model

from adapterbank.adapters.names import base_model_id
from adapterbank.bank import Bank
from adapterbank.errors import AdapterBankError, BankError
from adapterbank.training.examples import TASKS
from adapterbank.training.loop import TaskResult, train
from adapterbank.training.method import Method, Settings, Tell
from adapterbank.training.models import BaseModel
from adapterbank.tuner import EigenLoraConfig, augment, optimizer_groups
from adapterbank.tuner.live import adapter_config
from adapterbank.tuner.optimizer import COEFFICIENT_LR, HEAD_LR

DIRECTIONS = 16
"""Of the bank and of the gradient by default: together what did best in ``docs/benchmarks/adaptation.md``."""
CORE_DIRECTIONS = 22
"""Of the bank for a core, which then has as many values as coefficients of rank 8 on 32 directions."""
CORE_LR = 3e-2
"""What a core wanted there, three times the rate of coefficients."""


@dataclass(frozen=True, kw_only=True)
class TaskSettings(Settings):
    """How a task is trained in a bank.

    Raises:
        AdapterBankError: If a value is out of range.
    """

    r: int = 8
    k: int | None = None
    """Directions of the bank's basis; by default 16, or as many as there are."""
    start: str = "mean"
    """Where the coefficients start; see ``EigenLoraConfig``."""
    lr: float = COEFFICIENT_LR
    """Of the coefficients."""
    head_lr: float = HEAD_LR
    gradient_directions: int | None = None
    """Directions of the task's own gradient beside the bank's, see ``adapterbank.tuner.augment``; by default 16, none
    in a flat bank."""

    train: str = "coefficients"
    """See ``EigenLoraConfig``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_least(gradient_directions=0)


@dataclass(frozen=True, kw_only=True)
class CoreSettings(TaskSettings):
    """How one core between the bank's directions is trained: what took the fewest bytes in the study.

    Raises:
        AdapterBankError: If a value is out of range, or directions of the gradient are asked for.
    """

    k: int | None = None
    """By default 22, or as many as there are."""
    start: str = "base"
    lr: float = CORE_LR
    gradient_directions: int | None = 0
    train: str = "core"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gradient_directions:
            raise AdapterBankError(
                f"gradient_directions={self.gradient_directions}: a core lies between the bank's directions; leave them"
                " out, or train coefficients"
            )


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
    """Train a task's coefficients and head in a bank; see :func:`adapterbank.training.loop.train`.

    Args:
        bank: The bank, or its directory.
        model: Directory or hub id of the bank's base model.
        data: A file with one JSON object a line.
        out: A new or empty directory.
        settings: How to train.
        eval_data: A file like ``data`` to evaluate on; by default a share of ``data``.
        resume: Continue from the last checkpoint in ``out``, if there is one.
        progress: Told about each stage.

    Raises:
        MissingFileError: If the bank or a file isn't there.
        AdapterBankError: If the data, the model or ``out`` can't be used.
    """
    bank = bank if isinstance(bank, Bank) else Bank.load(Path(bank).expanduser())
    method = _InBank(_in_full(settings, bank), bank, base=bank.index.base or base_model_id(str(model)))
    return train(method, model, data, out, eval_data=eval_data, resume=resume, progress=progress)


def _in_full(settings: TaskSettings, bank: Bank) -> TaskSettings:
    """With the defaults that depend on the bank."""
    k, gradient, is_core = settings.k, settings.gradient_directions, settings.train == "core"
    if gradient is None:
        gradient = 0 if bank.index.method == "flat" else DIRECTIONS
    if k is None and (gradient or is_core):
        k = CORE_DIRECTIONS if is_core else DIRECTIONS
        try:
            bank.basis(k)
        except BankError:
            k = None  # a small bank: all there are
    return replace(settings, k=k, gradient_directions=gradient)


class _InBank(Method):
    def __init__(self, settings: TaskSettings, bank: Bank, *, base: str | None) -> None:
        self.settings: TaskSettings = settings
        self.bank, self.base = bank, base
        self.looking = "find directions" if settings.gradient_directions else None

    def adapted(self, base: BaseModel, checkpoint: Path | None) -> Any:
        config = EigenLoraConfig(
            bank=self.bank,
            r=self.settings.r,
            k=self.settings.k,
            start=self.settings.start,
            train=self.settings.train,
            task_type=TASKS[self.settings.task],
            modules_to_save=base.heads or None,
            # augment brings them, or the checkpoint
            gradient_directions=(self.settings.gradient_directions or 0) if checkpoint else 0,
        )
        return get_peft_model(base.model, config)

    def look(self, model: Any, batches: Iterable[Any], progress: Tell) -> None:
        augment(model, batches, self.settings.gradient_directions or 0)

    def optimizer_groups(self, model: Any) -> list[dict[str, Any]]:
        return optimizer_groups(model, self.settings.lr, head_lr=self.settings.head_lr)

    def made_of(self, model: Any) -> dict[str, Any]:
        return {"bank": adapter_config(model).bank_fingerprint}

    def save(self, model: Any, directory: str) -> None:
        # the folder that the base was loaded from is nobody's else
        adapter_config(model).base_model_name_or_path = self.base
        model.save_pretrained(directory, save_embedding_layers=False)
