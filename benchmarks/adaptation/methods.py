"""The rivals: what each one puts into the model, and which parameters it trains at the method's own rate."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

from adapterbank.shira import ShiraTunerConfig, calibrate
from adapterbank.shira.masks import GRADIENT_KINDS
from adapterbank.tuner import EigenLoraConfig, augment, init_lora, nearest, optimizer_groups, start_at
from benchmarks.adaptation.subject import Batch, Split, Subject

BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to adapt a model."""

    name: str
    kind: str
    """``head``: nothing but the head; ``bank`` and ``sparse``: ours; ``analytic``: the task's own LoRA, projected; or
    the name of one of PEFT's configs."""
    lr: float
    """Of all but the head."""
    head_lr: float = 1e-2
    """Of the head beside the method; the head alone has ``lr``."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of the method's config."""
    fit: str = "product"
    """How the bank is fitted, where the method takes one."""
    gradient: dict[str, Any] = field(default_factory=dict)
    """Arguments of ``augment``; without any there are no gradient directions."""
    start: dict[str, Any] = field(default_factory=dict)
    """Arguments of ``init_lora``; or ``nearest``: how many members to start from; or ``components``: in which last
    share of the steps these are trained too; or ``merged``: where the base model itself starts."""

    @property
    def needs_bank(self) -> bool:
        """Whether it takes anything from the source adapters."""
        return self.kind in ("bank", "analytic") or bool(self.start)


def build(
    method: Method, subject: Subject, split: Split, bank: Path | None, *, seed: int
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """The model with what the method adds, and the optimizer's groups; ``bank`` where the method needs one."""
    base = subject.base(split)
    torch.manual_seed(seed)
    if method.kind == "head":
        return _head_alone(subject, base, method.lr)
    heads = {"modules_to_save": list(subject.head)} if subject.head else {}
    if method.kind == "sparse":
        return _sparse(method, subject, split, base, heads, seed)
    if method.kind != "bank":
        config = getattr(peft, method.kind)(target_modules=list(subject.targets), **heads, **method.config)
        model = peft.get_peft_model(base, config)
        if method.start:
            init_lora(model, bank, **method.start)
        return model, _groups(subject, model, method)
    if "merged" in method.start:
        base = _merged(subject, base, bank, method.start["merged"])
    model = peft.get_peft_model(base, EigenLoraConfig(bank=bank, **heads, **method.config))
    if method.gradient:
        batches = _batches(subject, split, seed)
        augment(model, batches, **method.gradient)
    if "nearest" in method.start:
        scores = nearest(model, _batches(subject, split, seed), bank)
        best = list(islice(scores, method.start["nearest"]))
        start_at(model, bank, dict.fromkeys(best, method.start["weight"] / len(best)))
    return model, optimizer_groups(model, method.lr, head_lr=method.head_lr)


def _merged(subject: Subject, base: nn.Module, bank: Path | None, start: str) -> nn.Module:
    """The base model with the update merged that a LoRA of rank 8 from the bank starts with."""
    assert bank is not None
    model: Any = peft.get_peft_model(base, peft.LoraConfig(target_modules=list(subject.targets), r=8, lora_alpha=16))
    init_lora(model, bank, start=start)
    merged: nn.Module = model.merge_and_unload()
    return merged


def _sparse(
    method: Method, subject: Subject, split: Split, base: nn.Module, heads: dict[str, Any], seed: int
) -> tuple[nn.Module, list[dict[str, Any]]]:
    fields = {"seed": seed, **method.config}  # a random mask of its own for each seed
    config = ShiraTunerConfig(target_modules=list(subject.targets), **heads, **fields)
    model = peft.get_peft_model(base, config)
    if config.mask in GRADIENT_KINDS:
        calibrate(model, _batches(subject, split, seed))
    return model, _groups(subject, model, method)


def _batches(subject: Subject, split: Split, seed: int) -> list[Batch]:
    examples: Sequence[Any] = random.Random(seed).sample(split.train, len(split.train))
    return [subject.batch(examples[i : i + BATCH]) for i in range(0, len(examples), BATCH)]


def _head_alone(subject: Subject, base: nn.Module, lr: float) -> tuple[nn.Module, list[dict[str, Any]]]:
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(is_head(subject, name))
    return base, [{"params": [p for p in base.parameters() if p.requires_grad], "lr": lr}]


def _groups(subject: Subject, model: nn.Module, method: Method) -> list[dict[str, Any]]:
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head = [p for name, p in trained if is_head(subject, name)]
    rest = [p for name, p in trained if not is_head(subject, name)]
    groups = [{"params": rest, "lr": method.lr}, {"params": head, "lr": method.head_lr}]
    return [group for group in groups if group["params"]]


def is_head(subject: Subject, name: str) -> bool:
    """Whether a parameter or a stored tensor belongs to the head."""
    return any(part in name.split(".") for part in subject.head)
