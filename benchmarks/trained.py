"""Models to adapt, with a bank for them and a batch, and the ways of adapting them: PEFT's and ours."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, ShiraConfig, SupertuningConfig, get_peft_model
from torch import Tensor, nn

from adapterbank.adapters import LoraAdapter, LoraFactors
from adapterbank.bank import Bank
from adapterbank.demo.data import load_task
from adapterbank.demo.models import load_classifier, load_tokenizer
from adapterbank.demo.train import TrainSettings, batches
from adapterbank.shira import ShiraTunerConfig
from adapterbank.tuner import EigenLoraConfig

VARIANTS = ("lora", "bank")
SPARSE = ("lora", "sparse", "peft-shira", "supertuning")
"""Ours is ``sparse``."""
MEMBERS = 8


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A frozen model and what one step of training it needs."""

    model: nn.Module
    targets: Mapping[str, tuple[int, int]]
    """``(d_in, d_out)`` of the layers to adapt, by name."""
    loss: Callable[[nn.Module], Tensor]
    """Of one batch, always the same."""
    task_type: str | None = None


def stack(*, layers: int, width: int, tokens: int) -> Subject:
    """Square linear layers one after another, whose outputs neither grow nor vanish, and a batch of tokens."""
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers))).requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=width**-0.5)
    x, y = torch.randn(2, tokens, width)
    return Subject(
        model=model,
        targets={str(i): (width, width) for i in range(layers)},
        loss=lambda adapted: F.mse_loss(adapted(x), y),
    )


def classifier(*, texts: int, max_tokens: int) -> Subject:
    """The demo's MiniLM with a fresh head on the demo's layers, and a batch of real texts."""
    settings = TrainSettings(task="autos-motorcycles")
    task = load_task(settings.task, train=settings.examples, test=0)
    model = load_classifier(len(task.labels))
    inputs, labels = next(batches(load_tokenizer(), task.train, texts, max_tokens))
    names = [name for name, _ in model.named_modules() if name.endswith(settings.target_modules)]
    return Subject(
        model=model,
        targets={n: (m.in_features, m.out_features) for n in names for m in [model.get_submodule(n)]},
        loss=lambda adapted: F.cross_entropy(adapted(**inputs).logits, labels),
        task_type="SEQ_CLS",
    )


JOBS: dict[str, Callable[..., Subject]] = {"stack": stack, "classifier": classifier}


def write_bank(targets: Mapping[str, tuple[int, int]], out: Path, *, k: int, r: int) -> Path:
    """Save a bank of ``k`` directions a side for these layers, fitted on members that share so many."""
    shared = {name: [torch.linalg.qr(torch.randn(d, k)).Q for d in sizes if d >= k] for name, sizes in targets.items()}
    members = [
        LoraAdapter.from_factors(
            f"member-{i}",
            {
                name: LoraFactors(A=torch.randn(r, k) @ V.T / 10, B=U @ torch.randn(k, r) / 10, scale=1.0)
                for name, (V, U) in shared.items()
            },
            base="synthetic/base",
        )
        for i in range(MEMBERS)
    ]
    Bank.fit(members, k=k).save(out)
    return out


def config(variant: str, subject: Subject, bank: Path, *, r: int, k: int = 0, density: float = 0.0) -> Any:
    """A fresh config; PEFT changes those that it is given."""
    if variant == "bank":
        return EigenLoraConfig(bank=bank, k=k, r=r, task_type=subject.task_type)
    common = {"target_modules": list(subject.targets), "task_type": subject.task_type}
    if variant == "lora":
        return LoraConfig(r=r, **common)
    if variant == "sparse":
        return ShiraTunerConfig(density=density, **common)
    if variant == "supertuning":
        return SupertuningConfig(sparsity=1 - density, **common)
    d_in, d_out = next(iter(subject.targets.values()))
    return ShiraConfig(r=max(1, int(density * d_in * d_out / (d_in + d_out))), **common)


def adapted(variant: str, subject: Subject, bank: Path, **sizes: Any) -> Any:
    """The subject's model with one adapter, in training mode; ``sizes`` as in :func:`config`."""
    return get_peft_model(subject.model, config(variant, subject, bank, **sizes)).train()


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those that ask for gradients."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def stepper(model: nn.Module, subject: Subject) -> Callable[[], None]:
    """One step: forward, backward, AdamW, gradients let go."""
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=1e-4)

    def step() -> None:
        subject.loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
