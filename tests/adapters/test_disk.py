"""Files that several processes change."""

import multiprocessing
import os
import time

import pytest

from adapterbank.adapters.disk import locked, replace_file


def _hold(path, order, seconds):
    with locked(path):
        order.append("in")
        time.sleep(seconds)
        order.append("out")


def test_one_process_waits_for_the_other(tmp_path):
    context = multiprocessing.get_context("fork")
    with context.Manager() as shared:
        order = shared.list()
        several = [context.Process(target=_hold, args=(tmp_path / "lock", order, 0.05)) for _ in range(3)]
        for process in several:
            process.start()
        for process in several:
            process.join()
        assert list(order) == ["in", "out"] * 3


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a"
    replace_file(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a"]
    monkeypatch.undo()
    replace_file(path, b"new", durable=False)
    assert path.read_bytes() == b"new"
