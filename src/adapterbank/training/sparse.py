"""A task as a sparse adapter: one or two per cent of some weights, and a head."""

from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from peft import get_peft_model

from adapterbank.adapters.names import base_model_id
from adapterbank.shira import SparseDelta
from adapterbank.shira.masks import GRADIENT_KINDS
from adapterbank.shira.tuner import ShiraTunerConfig, calibrate, optimizer_groups
from adapterbank.shira.tuner.optimizer import HEAD_LR, VALUE_LR
from adapterbank.training.examples import TASKS
from adapterbank.training.loop import TaskResult, train
from adapterbank.training.method import Method, Settings, Tell
from adapterbank.training.models import BaseModel


@dataclass(frozen=True, kw_only=True)
class SparseSettings(Settings):
    """How a sparse adapter is trained.

    Raises:
        AdapterBankError: If a value is out of range.
    """

    density: float = 0.01
    """Share of each layer's weights that is trained."""
    mask: str = "wm"
    """Which weights; see ``ShiraTunerConfig``, as for the two below."""
    part: int = 0
    offset: int = 0
    lr: float = VALUE_LR
    """Of the values."""
    head_lr: float = HEAD_LR

    def __post_init__(self) -> None:
        super().__post_init__()
        self.config()

    def config(self, **more: Any) -> ShiraTunerConfig:
        """What PEFT is told, checked."""
        return ShiraTunerConfig(
            density=self.density,
            mask=self.mask,
            part=self.part,
            offset=self.offset,
            seed=self.seed,
            task_type=TASKS[self.task],
            **more,
        )


def train_sparse(
    model: str | PathLike[str],
    data: str | PathLike[str],
    out: str | PathLike[str],
    settings: SparseSettings,
    *,
    eval_data: str | PathLike[str] | None = None,
    resume: bool = False,
    progress: Tell | None = None,
) -> TaskResult:
    """Train a sparse adapter and a head; see :func:`adapterbank.training.loop.train`.

    Values are stored in 16 bits.

    Args:
        model: Directory or hub id of the base model.
        data: A file with one JSON object a line.
        out: A new or empty directory.
        settings: How to train.
        eval_data: A file like ``data`` to evaluate on; by default a share of ``data``.
        resume: Continue from the last checkpoint in ``out``, if there is one.
        progress: Told about each stage.

    Raises:
        MissingFileError: If a file isn't there.
        AdapterBankError: If the data, the model or ``out`` can't be used.
    """
    method = _Sparse(settings, base=base_model_id(str(model)))
    return train(method, model, data, out, eval_data=eval_data, resume=resume, progress=progress)


class _Sparse(Method):
    def __init__(self, settings: SparseSettings, *, base: str | None) -> None:
        self.settings: SparseSettings = settings
        self.base = base
        self.looking = "find positions" if settings.mask in GRADIENT_KINDS else None

    def adapted(self, base: BaseModel, checkpoint: Path | None) -> Any:
        if checkpoint is not None:
            config: Any = ShiraTunerConfig.from_pretrained(str(checkpoint))
            config.inference_mode = False
        else:
            config = self.settings.config(modules_to_save=base.heads or None)
        return get_peft_model(base.model, config)

    def look(self, model: Any, batches: Iterable[Any], progress: Tell) -> None:
        calibrate(model, batches, progress=progress)

    def optimizer_groups(self, model: Any) -> list[dict[str, Any]]:
        return optimizer_groups(model, self.settings.lr, head_lr=self.settings.head_lr)

    def made_of(self, model: Any) -> dict[str, Any]:
        return {}

    def save(self, model: Any, directory: str) -> None:
        # the folder that the base was loaded from is nobody's else
        model.peft_config["default"].base_model_name_or_path = self.base
        SparseDelta.from_peft(model).save(directory)
