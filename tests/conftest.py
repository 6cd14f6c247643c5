"""Fixtures that several parts share."""

import sys
from pathlib import Path

import pytest

# tests are no package (pytest's importlib mode), and families.py also serves the benchmarks
sys.path.insert(0, str(Path(__file__).parent))

from families import make_family


@pytest.fixture
def adapter_dirs(tmp_path: Path) -> list[Path]:
    """Three related adapters in PEFT's format: 2 layers, q and v, 32 features, rank 4, a task head of 3 classes."""
    return make_family(tmp_path / "family", n=3, rank=4, hidden=32, layers=2, shared_rank=8, classifier=3)
