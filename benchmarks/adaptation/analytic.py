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
def projected(subject: Subject, split: Split, adapter: Path, bank: Path, k: int) -> nn.Module:
    """The model with a LoRA whose every update is ``U U^T dW V^T V``; its head is the LoRA's own."""
    base = subject.base(split)
    model: Any = PeftModel.from_pretrained(base, adapter)
    layers: dict[str, Any] = {name: m for name, m in base.named_modules() if isinstance(m, LoraLayer)}
    basis = Bank.load(bank).basis(k)
    for name, module in match_layers(basis.modules, layers).items():
        A, B = (getattr(layers[name], factor)["default"].weight for factor in ("lora_A", "lora_B"))
        V, U = basis.modules[module].V, basis.modules[module].U
        A.copy_(A @ V.T @ V)
        B.copy_(U @ (U.T @ B))
    return model
