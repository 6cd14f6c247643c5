"""Members are read when they're named, and leave when there is no room."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from adapterbank.bank import Bank
from adapterbank.errors import BankError
from adapterbank.runtime import AdapterEngine
from tiny_models import TARGETS, adapters_for, llama


@pytest.fixture(scope="module")
def bank():
    return Bank.fit(adapters_for(llama(), TARGETS["llama"]), max_error=0.1)


@pytest.fixture
def hasty():
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_members_are_read_ahead_while_others_push_them_out(bank, tmp_path, hasty):
    engine = AdapterEngine(llama(), bank, memory=0, cache=tmp_path)
    engine.load()
    together = threading.Barrier(4)

    def read(seed):
        together.wait()
        for i in range(100):
            engine.load([bank.names[(i * seed) % len(bank)]])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, (1, 2, 3, 4)))
    assert engine.report().members == 1


def test_a_member_that_was_forgotten_leaves_its_room(bank):
    one = AdapterEngine(llama(), bank)
    one.load(["a0"])
    engine = AdapterEngine(llama(), bank, memory=2 * one.report().shared_bytes + 2 * one.report().private_bytes + 1)
    for _ in range(3):
        engine.load(["a0", "a1"])
        engine.remove("a0")
    engine.load(["a2"])
    assert [member.name for member in engine._members.held] == ["a1", "a2"]


def test_no_number_of_bytes_is_refused(bank):
    model = llama()
    with pytest.raises(BankError, match="memory=-1 is no number of bytes"):
        AdapterEngine(model, bank, memory=-1)
    assert not any(layer._forward_hooks for layer in model.modules())
