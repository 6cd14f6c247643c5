"""Parameter groups with learning rates that work without tuning."""

from typing import Any

from torch import nn

from adapterbank.errors import AdapterBankError
from adapterbank.shira.tuner.config import PREFIX

VALUE_LR = 1e-2
"""On MiniLM best with ``grad`` and ``snip``; the others did better with 3e-2 (docs/benchmarks/shira.md). Large models
want less."""
HEAD_LR = 3e-3


def optimizer_groups(model: nn.Module, lr: float = VALUE_LR, *, head_lr: float = HEAD_LR) -> list[dict[str, Any]]:
    """Groups for any torch optimiser, without weight decay: it would pull the weights to the base model's.

    Args:
        model: With a sparse adapter; what asks for gradients is trained.
        lr: Of the sparse values.
        head_lr: Of everything else, e.g. ``modules_to_save``.

    Raises:
        AdapterBankError: If no sparse adapter asks for gradients.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    values = [parameter for name, parameter in trained if f".{PREFIX}" in name]
    head = [parameter for name, parameter in trained if f".{PREFIX}" not in name]
    if not values:
        raise AdapterBankError(
            "no sparse adapter asks for gradients; activate one with set_adapter, or load it with is_trainable=True"
        )
    groups = [{"name": "values", "params": values, "lr": lr, "weight_decay": 0.0}]
    return [*groups, {"name": "head", "params": head, "lr": head_lr, "weight_decay": 0.0}] if head else groups
