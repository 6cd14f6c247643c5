"""Small families on disk, made once, and ways to look at what a bank gives back."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adapterbank.adapters import LoraAdapter
from adapterbank.bank import Bank
from families import make_family


@pytest.fixture(scope="session")
def planted(tmp_path_factory) -> list[Path]:
    """Ten related adapters without heads: 2 layers, q and v, 64 features, rank 4 of 6 shared directions, any gauge."""
    return make_family(
        tmp_path_factory.mktemp("planted"), n=10, rank=4, hidden=64, layers=2, shared_rank=6, gauge="random"
    )


@pytest.fixture(scope="session")
def later(tmp_path_factory) -> list[Path]:
    """Three more of the same family, that come when the bank is there."""
    out = tmp_path_factory.mktemp("later")
    every = make_family(out / "all", n=13, rank=4, hidden=64, layers=2, shared_rank=6, gauge="random")
    return [Path(shutil.move(source, out / f"later_{i}")) for i, source in enumerate(every[10:])]


@pytest.fixture(scope="session")
def _fitted(planted, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("fitted") / "bank"
    Bank.fit(planted, max_error=0.1).save(directory)
    return directory


@pytest.fixture(scope="session")
def _fine(planted, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("fine") / "bank"
    Bank.fit(planted, max_error=0.02).save(directory)
    return directory


@pytest.fixture
def fine_dir(_fine, tmp_path) -> Path:
    """The same at an error of 0.02: its members keep more than the shared directions, so theirs is the full rank."""
    return Path(shutil.copytree(_fine, tmp_path / "bank"))


@pytest.fixture
def bank_dir(_fitted, tmp_path) -> Path:
    """A bank of the planted family on disk, at an error of 0.1, to be spoilt."""
    return Path(shutil.copytree(_fitted, tmp_path / "bank"))


@pytest.fixture
def bank(bank_dir) -> Bank:
    """That bank, loaded."""
    return Bank.load(bank_dir)


@pytest.fixture(scope="session")
def distance() -> Callable[..., float]:
    """``||dW - dW'|| / ||dW||`` over all modules, through dense updates: not the way the bank measures it."""

    def measure(one, other) -> float:
        left, right = (a if isinstance(a, LoraAdapter) else LoraAdapter.load(a) for a in (one, other))
        assert dict(left.modules) == dict(right.modules)
        lost = energy = torch.zeros((), dtype=torch.float64)
        for module in left.modules:
            ours, theirs = left.factors(module), right.factors(module)
            dense = [f.scale * f.B.double() @ f.A.double() for f in (ours, theirs)]
            energy = energy + dense[0].square().sum()
            lost = lost + (dense[0] - dense[1]).square().sum()
        return float((lost / energy).sqrt()) if energy else float(lost.sqrt())

    return measure


@pytest.fixture(scope="session")
def size_of() -> Callable[[Path], int]:
    """Bytes of all files of a directory."""
    return lambda directory: sum(p.stat().st_size for p in directory.iterdir())


@pytest.fixture(scope="session")
def listing() -> Callable[[Path], dict[str, bytes]]:
    """Every file of a directory, with its content."""
    return lambda directory: {p.name: p.read_bytes() for p in sorted(directory.iterdir())}
