"""Parameter groups with learning rates that work without tuning."""

from typing import Any

from torch import nn

from adapterbank.errors import AdapterBankError

COEFFICIENT_LR = 1e-2
HEAD_LR = 3e-3
COMPONENT_LR = 1e-3


def optimizer_groups(
    model: nn.Module,
    lr: float = COEFFICIENT_LR,
    *,
    head_lr: float = HEAD_LR,
    component_lr: float = COMPONENT_LR,
    weight_decay: float = 0.0,
    loraplus_ratio: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups for any torch optimiser: coefficients, components and free pairs, head.

    Coefficients want far higher rates than a LoRA's factors: there are ``d / k`` times fewer of them to move as much.
    A head wants a lower one beside them than alone, or it overfits before the layers have moved.

    Args:
        model: With adapters from a bank; what asks for gradients is trained.
        lr: Of the coefficients.
        head_lr: Of everything that is no adapter, e.g. ``modules_to_save``.
        component_lr: Of own components and free pairs, which are as large as a LoRA's factors.
        weight_decay: Of all groups; biases and norms of the head take none.
        loraplus_ratio: Factor of ``coef_B``'s rate against ``coef_A``'s (LoRA+, arXiv:2402.12354).

    Raises:
        AdapterBankError: If nothing asks for gradients.
    """
    groups: dict[str, dict[str, Any]] = {
        "coef_A": {"lr": lr, "weight_decay": weight_decay},
        "coef_B": {"lr": lr * loraplus_ratio, "weight_decay": weight_decay},
        "components": {"lr": component_lr, "weight_decay": weight_decay},
        "head": {"lr": head_lr, "weight_decay": weight_decay},
        "head, no decay": {"lr": head_lr, "weight_decay": 0.0},
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[_group(name, parameter.ndim)].setdefault("params", []).append(parameter)
    found = [{"name": name, **group} for name, group in groups.items() if "params" in group]
    if not found:
        raise AdapterBankError(
            "no parameter asks for gradients; activate an adapter with set_adapter, or load it with is_trainable=True"
        )
    return found


def _group(name: str, ndim: int) -> str:
    if ".eig_coef_A." in name or ".eig_core." in name:
        return "coef_A"
    if ".eig_coef_B." in name:
        return "coef_B"
    if ".eig_" in name:
        return "components"
    return "head" if ndim > 1 else "head, no decay"
