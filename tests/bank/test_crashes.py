"""Writers that die for real, at random moments: the bank is the old one or the new one, and whole."""

import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterbank.adapters import disk
from adapterbank.bank import Bank, store
from adapterbank.errors import MissingFileError
from families import make_family

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forked writers")
KILLS = 80
"""A kind of change, half of them at the writer's own system calls; three kinds make 240."""
WAIT = 60.0
"""Seconds after which a child is given up."""


def forked(work: Callable[[], object]) -> int:
    """Run ``work`` in a child that shares our imports; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def status_of(pid: int) -> int:
    """Wait for a child; the signal that ended it is negative."""
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.0005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"a writer took over {WAIT:g} s")


class Deadly:
    """Replaces the writer's system calls by ones that kill the process just before the ``moment``-th of them."""

    def __init__(self, moment: int | None = None) -> None:
        self.moment, self.calls = moment, 0

    def __enter__(self) -> "Deadly":
        for name in ("replace", "fsync", "open", "close"):
            setattr(os, name, self._counted(getattr(os, name)))
        Path.unlink = self._counted(Path.unlink)
        disk._lock = self._counted(disk._lock)
        return self

    def __exit__(self, *_: object) -> None:
        pass  # the process ends here

    def _counted(self, call: Callable) -> Callable:
        def counted(*arguments, **options):
            self.calls += 1
            if self.calls == self.moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return counted


def state(directory: Path) -> tuple[str, ...] | None:
    """Names of the members of the bank, each of which decodes; none where there is no bank."""
    try:
        bank = Bank.load(directory)
    except MissingFileError:
        return None
    for name in bank.names:
        bank.reconstruct(name)
    return tuple(bank.names)


def swept(directory: Path) -> bool:
    """Whether the bank's directory holds the files that its index names, and nothing else."""
    index = Bank.load(directory).index
    named = {store.basis_file(index.basis)} | {store.member_file(m.sha256) for m in index.members.values()}
    return {p.name for p in directory.iterdir()} == named | {store.INDEX, store.LOCK}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> list[Path]:
    """Adapters so small that most of a change is writing."""
    return make_family(tmp_path_factory.mktemp("tiny"), n=9, rank=1, hidden=8, layers=1, shared_rank=2, modules=("q",))


@pytest.fixture(scope="module")
def small(tiny, tmp_path_factory) -> Path:
    """A bank of the first two."""
    directory = tmp_path_factory.mktemp("small") / "bank"
    Bank.fit(tiny[:2], max_error=0.5).save(directory)
    return directory


def changes(small, tiny, directory):
    """Each change as ``(names before, names after, work)``; ``directory`` holds the bank before, if any."""
    two = ("adapter_000", "adapter_001")

    def save():
        Bank.load(small).save(directory)

    def add():
        with Bank.edit(directory) as bank:
            bank.add(tiny[2])

    def absorb():
        with Bank.edit(directory) as bank:
            bank.absorb(tiny[2])

    three = (*two, "adapter_002")
    return {"save": (None, two, save), "add": (two, three, add), "absorb": (two, three, absorb)}


@pytest.mark.parametrize("change", ["save", "add", "absorb"])
def test_a_writer_killed_at_any_moment_leaves_the_old_state_or_the_new(small, tiny, tmp_path, change):
    rng = random.Random(0)
    directory, count = tmp_path / "bank", tmp_path / "count"
    before, after, work = changes(small, tiny, directory)[change]

    def put_back():
        # through the same writer: it gets the lock, and sweeps what the last one left
        if before is None:
            (directory / store.INDEX).unlink(missing_ok=True)
        elif state(directory) != before or not swept(directory):
            Bank.load(small).save(directory)
            assert swept(directory)

    def count_calls():
        with Deadly() as deadly:
            work()
            count.write_text(str(deadly.calls))

    def die_at(moment):
        with Deadly(moment):
            work()

    put_back()
    began = time.monotonic()
    assert status_of(forked(count_calls)) == 0  # one that lives
    lasted, calls = time.monotonic() - began, int(count.read_text())
    assert state(directory) == after
    seen = []
    for kill in range(KILLS):
        put_back()
        if kill % 2:
            pid = forked(lambda moment=1 + kill // 2 % calls: die_at(moment))
        else:
            pid = forked(work)
            time.sleep(rng.uniform(0, lasted))
            os.kill(pid, signal.SIGKILL)
        assert status_of(pid) in (0, -signal.SIGKILL)
        seen.append(state(directory))
        assert seen[-1] in (before, after)
    # every system call had its turn, those before the commit and those after it
    assert calls <= KILLS // 2
    assert set(seen[1::2]) == {before, after}
    Bank.load(small).save(directory)
    assert swept(directory)


def test_two_processes_that_add_at_once_lose_nothing(small, tiny, tmp_path):
    directory = tmp_path / "bank"
    Bank.load(small).save(directory)

    def add(paths):
        for path in paths:
            with Bank.edit(directory) as bank:
                bank.add(path)

    children = [forked(lambda paths=paths: add(paths)) for paths in (tiny[2:6], tiny[6:])]
    # a reader beside them sees whole banks; none of these members ever goes
    while len(names := state(directory)) < 4:
        assert names[:2] == ("adapter_000", "adapter_001")
    assert [status_of(child) for child in children] == [0, 0]
    assert set(state(directory)) == {path.name for path in tiny}
    assert swept(directory)
