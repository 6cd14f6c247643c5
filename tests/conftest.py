"""Fixtures that several parts share."""

import sys
from pathlib import Path

import pytest
import torch

# tests are no package (pytest's importlib mode), and families.py also serves the benchmarks
sys.path.insert(0, str(Path(__file__).parent))

from families import make_family


@pytest.fixture
def adapter_dirs(tmp_path: Path) -> list[Path]:
    """Three related adapters in PEFT's format: 2 layers, q and v, 32 features, rank 4, a task head of 3 classes."""
    return make_family(tmp_path / "family", n=3, rank=4, hidden=32, layers=2, shared_rank=8, classifier=3)


@pytest.fixture(scope="session")
def bank_dirs(tmp_path_factory) -> dict[str, Path]:
    """A bank on disk for each of the tiny models, that stores few directions: the tuner's are derived."""
    # not above: shape checks are put in when the package is first imported
    from adapterbank.bank import Bank
    from tiny_models import MODELS, TARGETS, adapters_for

    found = {}
    for name, make in MODELS.items():
        found[name] = tmp_path_factory.mktemp(name) / "bank"
        Bank.fit(adapters_for(make(), TARGETS[name]), max_error=0.1).save(found[name])
    return found


@pytest.fixture(scope="session")
def bank_dir(bank_dirs) -> Path:
    """The bank for ``llama``."""
    return bank_dirs["llama"]


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    """A batch for the tiny models."""
    seeded = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 50, (4, 7), generator=seeded)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
