"""The adapters that are recycled: plain LoRAs, trained once and cached, and banks of them."""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from adapterbank.adapters import LoraAdapter, LoraFactors
from adapterbank.bank import Bank
from adapterbank.demo.assets import cache_dir, place
from benchmarks.adaptation.methods import Method, build
from benchmarks.adaptation.subjects import SUBJECTS
from benchmarks.adaptation.training import Recipe, evaluate, train

RANK = 8
ONE_SEED = 1000


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source adapter; equal fields, same adapter."""

    subject: str
    task: str
    family: str
    """``private``: a random start of its own; ``oneseed``: all adapters start from one."""
    examples: int = 640
    steps: int = 120
    lr: float = 1.5e-3
    seed: int = 100
    """Of the data: not one of the study's own."""

    @property
    def folder(self) -> Path:
        """Where it lies in the cache."""
        return cache_dir() / "adaptation" / self.subject / f"{self.family}-{self.task}-{_hash(asdict(self))}"

    def train(self) -> Path:
        """PEFT directory of the adapter, from the cache if it is there."""
        subject, folder = SUBJECTS[self.subject], self.folder
        if folder.exists():
            return folder
        split = subject.split(self.task, train=self.examples, seed=self.seed)
        init = ONE_SEED if self.family == "oneseed" else int(_hash(self.task), 16) % 2**31
        method = Method(name="source", kind="LoraConfig", lr=self.lr, config={"r": RANK, "lora_alpha": 2 * RANK})
        model, groups = build(method, subject, split, None, seed=init)
        recipe = Recipe(steps=self.steps, evaluate=(1.0,), seed=self.seed)
        train(subject, model, groups, split.train, split.validation, recipe)
        loss, right = evaluate(subject, model, split.test)
        meta = {**asdict(self), "test_loss": loss, "test_accuracy": float(right.double().mean())}
        peft_model: Any = model
        peft_model.peft_config["default"].base_model_name_or_path = subject.base_id
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            peft_model.save_pretrained(Path(scratch) / self.task, save_embedding_layers=False)
            (Path(scratch) / self.task / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
            place(Path(scratch) / self.task, folder)
        return folder


@dataclass(frozen=True, kw_only=True)
class Recycled:
    """A bank of source adapters."""

    subject: str
    family: str
    tasks: tuple[str, ...]
    fit: str = "product"
    """``product``, or ``eigenlora``: the paper's centred PCA of A and of B, which keeps ``k`` directions."""
    k: int = 32
    noisy: int = 0
    """So many untrained adapters among them, of the others' mean size (spec E57)."""

    @property
    def sources(self) -> list[Source]:
        """The adapters that it is made of."""
        steps = SUBJECTS[self.subject].source_steps
        return [Source(subject=self.subject, task=task, family=self.family, steps=steps) for task in self.tasks]

    @property
    def folder(self) -> Path:
        """Where it lies in the cache."""
        return cache_dir() / "adaptation" / self.subject / f"bank-{_hash(asdict(self))}"

    def bank(self) -> Path:
        """Its directory, fitted if need be."""
        folder = self.folder
        if folder.exists():
            return folder
        adapters = [LoraAdapter.load(source.train()) for source in self.sources]
        adapters += _untrained(adapters, self.noisy)
        fitted = Bank.fit(adapters) if self.fit == "product" else Bank.fit(adapters, method="eigenlora", k=self.k)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            fitted.save(Path(scratch) / "bank")
            place(Path(scratch) / "bank", folder)
        return folder


def _untrained(adapters: Sequence[LoraAdapter], count: int) -> list[LoraAdapter]:
    """Gaussian adapters of the same shapes, each module's update as large as the others' on average."""
    made = []
    for i in range(count):
        seeded, factors = torch.Generator().manual_seed(i), {}
        for module in adapters[0].modules:
            like = [adapter.factors(module) for adapter in adapters]
            size = sum(float((f.scale * f.B @ f.A).norm()) for f in like) / len(like)
            A, B = (torch.randn(f.shape, generator=seeded) for f in (like[0].A, like[0].B))
            factors[module] = LoraFactors(A=A, B=B * (size / float((B @ A).norm())), scale=1.0)
        made.append(LoraAdapter.from_factors(f"untrained-{i}", factors, base=adapters[0].base))
    return made


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]
