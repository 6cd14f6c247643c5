"""Banks that fit the tiny models."""

from pathlib import Path

import pytest
import torch

from adapterbank.bank import Bank
from tiny_models import MODELS, TARGETS, adapters_for


@pytest.fixture(scope="session")
def bank_dirs(tmp_path_factory) -> dict[str, Path]:
    """A bank on disk for each model, that stores few directions: the tuner's are derived."""
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
    seeded = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 50, (4, 7), generator=seeded)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
