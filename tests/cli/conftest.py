"""One small family, one bank of it, and a way to call the command."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from adapterbank.cli import app
from families import make_family

Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    """Call the command in this process."""
    runner = CliRunner()
    return lambda *words, **options: runner.invoke(app, [str(word) for word in words], **options)


@pytest.fixture
def refused(run: Run) -> Callable[..., str]:
    """Call the command, hold it to one ``Error:`` line and exit code 1, and return the line."""

    def call(*words: object) -> str:
        result = run(*words)
        assert (result.exit_code, result.stdout) == (1, ""), result.output
        assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1, result.stderr
        return result.stderr

    return call


@pytest.fixture
def object_of(run: Run) -> Callable[..., dict]:
    """Call the command with ``--json`` and return its one object."""

    def call(*words: object) -> dict:
        result = run(*words, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return call


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four related adapters with a task head; read only."""
    out = tmp_path_factory.mktemp("family")
    return make_family(out, n=4, rank=2, hidden=128, layers=1, modules=("q",), shared_rank=3, classifier=3)


@pytest.fixture(scope="session")
def fitted(family: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of the first three; read only."""
    from adapterbank import Bank

    out = tmp_path_factory.mktemp("fitted") / "bank"
    Bank.fit(family[:3], max_error=0.1).save(out)
    return out


@pytest.fixture
def bank(fitted: Path, tmp_path: Path) -> Path:
    """A copy of the bank, to be changed."""
    return shutil.copytree(fitted, tmp_path / "bank")
