"""The paper's protocol without training: a task's own adapter, projected on what the others share (spec 2.4, "AL")."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from adapterbank.adapters.names import match_layers
from adapterbank.bank import Bank
from benchmarks.adaptation.subject import Split, Subject


@torch.no_grad()
def projected(subject: Subject, split: Split, adapter: Path, bank: Path, *, k: int, on: str = "bank") -> nn.Module:
    """The model with a LoRA whose every update is ``U U^T dW V^T V``; its head is the LoRA's own.

    Args:
        subject: The model that is adapted.
        split: The task.
        adapter: Its own LoRA.
        bank: Of other adapters.
        k: Directions a side.
        on: Which: the ``bank``'s or as many ``random`` ones; ``everything`` leaves the LoRA as it is, ``nothing`` only
            its head.
    """
    base = subject.base(split)
    model: Any = PeftModel.from_pretrained(base, adapter)
    layers: dict[str, Any] = {name: m for name, m in base.named_modules() if isinstance(m, LoraLayer)}
    if on == "everything":
        return model
    opened = Bank.load(bank)
    basis = opened.basis(0, random_directions=k) if on == "random" else opened.basis(k)
    for name, module in match_layers(basis.modules, layers).items():
        A, B = (getattr(layers[name], factor)["default"].weight for factor in ("lora_A", "lora_B"))
        V, U = basis.modules[module].V, basis.modules[module].U
        A.copy_(A @ V.T @ V)
        B.copy_(U @ (U.T @ B) if on != "nothing" else torch.zeros_like(B))
    return model
