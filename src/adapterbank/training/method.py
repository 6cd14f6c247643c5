"""What a kind of adapter brings to a training: its settings, and what it does before, at the start and at the end."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterbank.errors import AdapterBankError
from adapterbank.training.examples import TASKS
from adapterbank.training.models import BaseModel

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
