import random
import shutil
import threading
import time

import pytest
import torch
from torch import nn

from adapterbank.errors import AdapterError, MissingFileError, UnknownNameError
from adapterbank.shira.delta import SparseDelta
from adapterbank.shira.switch import Switcher
from sparse import Net, make_delta

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def copies(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal(model, before):
    return all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def family(model, n=3):
    return {f"a{i}": make_delta(model, seed=i) for i in range(n)}


def fail_after(monkeypatch, writes, error):
    """So many parameters can be overwritten; the next write fails."""
    whole, left = torch.Tensor.scatter_, [writes]

    def failing(self, *args):
        left[0] -= 1
        if left[0] < 0:
            raise error
        return whole(self, *args)

    monkeypatch.setattr(torch.Tensor, "scatter_", failing)


@dtypes
def test_a_thousand_switches_bring_back_every_bit(dtype):
    model = Net().to(dtype)
    deltas, before, order = family(model, 10), copies(model), random.Random(0)
    switcher = Switcher(model, deltas)
    expected = {}
    for name, delta in deltas.items():
        saved = delta.apply_(model)
        expected[name] = copies(model)
        delta.restore_(model, saved)
    for _ in range(1000):
        name = order.choice(switcher.names)
        if order.random() < 0.1:
            switcher.restore()
            assert equal(model, before)
        if order.random() < 0.2:
            switcher.switch(name, alpha=order.uniform(-1, 1))
        else:
            switcher.switch(name)
            assert equal(model, expected[name])
    switcher.restore()
    assert equal(model, before) and switcher.active is None


def test_switching_to_what_is_there_writes_nothing(monkeypatch):
    model = Net()
    switcher = Switcher(model, family(model))
    switcher.switch("a1")
    monkeypatch.setattr(torch.Tensor, "scatter_", None)
    switcher.switch("a1")
    with switcher.use("a1"):
        assert switcher.active == "a1"


def test_a_cast_while_an_adapter_is_in_gives_the_cast_base_back():
    model = Net()
    switcher, cast = Switcher(model, family(model)), copies(Net().to(torch.bfloat16))
    switcher.switch("a0")
    switcher.switch("a1")
    model.to(torch.bfloat16)
    switcher.switch("a0")
    for name, update in switcher._sources["a0"].updates.items():
        expected = (cast[name].float() + update.dense()).to(torch.bfloat16)
        assert torch.equal(model.get_parameter(name), expected)
    switcher.restore()
    assert equal(model, cast)


def test_the_task_head_comes_and_goes_with_its_adapter():
    model, head = Net(), torch.randn(20, 40)
    before = copies(model)
    deltas = {"law": make_delta(model, extras={"body.v.weight": head}), "news": make_delta(model, seed=1)}
    switcher = Switcher(model, deltas)
    switcher.switch("law", alpha=0.5)
    assert torch.equal(model.body["v"].weight, head)
    switcher.switch("news")
    assert torch.equal(model.body["v"].weight, before["body.v.weight"])
    switcher.switch("law")
    switcher.restore()
    assert equal(model, before)
    without = Switcher(model, deltas, heads=False)
    without.switch("law")
    assert torch.equal(model.body["v"].weight, before["body.v.weight"])


def test_the_forward_is_the_base_model_s():
    # S27: nothing but values has changed, so nothing is computed beside
    model, x = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 20)), torch.randn(4, 30)
    before = str(torch.export.export(model, (x,)).graph)
    switcher = Switcher(model, {"a": make_delta(model, only=("0.weight", "1.weight"))})
    switcher.switch("a")
    assert str(torch.export.export(model, (x,)).graph) == before
    assert [type(module) for module in model] == [nn.Linear, nn.Linear]


# --- from disk --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for name, delta in family(Net()).items():
        delta.save(tmp_path / "all" / name, dtype=torch.float32)
    return tmp_path / "all"


def test_a_directory_of_adapters_is_opened_one_by_one(folder):
    model, before = Net(), copies(Net())
    switcher = Switcher(model, folder)
    assert switcher.names == ["a0", "a1", "a2"]
    shutil.rmtree(folder / "a2")
    switcher.switch("a0")
    shutil.rmtree(folder / "a0")
    switcher.switch("a1")
    switcher.switch("a0")  # is in memory
    changed = copies(model)
    with pytest.raises(MissingFileError):
        switcher.switch("a2")
    assert equal(model, changed) and switcher.active == "a0"
    switcher.restore()
    assert equal(model, before)


def test_what_is_still_being_written_is_no_adapter(folder):
    shutil.copytree(folder / "a0", folder / ".a3.1a2b.tmp")
    assert Switcher(Net(), folder).names == ["a0", "a1", "a2"]


def test_the_one_used_longest_ago_leaves_when_memory_is_full(folder):
    model = Net()
    switcher = Switcher(model, folder)
    switcher.switch("a0")
    one = switcher._ready["a0"].bytes
    limited, before = Switcher(Net(), folder, memory=2 * one), copies(Net())
    for name in ("a0", "a1", "a0", "a2"):
        limited.switch(name)
    assert list(limited._ready) == ["a0", "a2"]
    for i in range(20):
        limited.switch(f"a{i % 3}")
        assert len(limited._ready) <= 2
    limited.restore()
    assert equal(limited.model, before)
    tiny = Switcher(Net(), folder, memory=0)
    for i in range(5):
        tiny.switch(f"a{i % 3}")
    tiny.restore()
    assert equal(tiny.model, before)


def test_prefetching_reads_in_the_background(folder):
    switcher = Switcher(Net(), folder)
    switcher.prefetch("a1")
    switcher._coming["a1"].result()
    shutil.rmtree(folder)
    switcher.switch("a1")
    assert switcher.active == "a1"
    switcher.prefetch("a2")
    with pytest.raises(MissingFileError):
        switcher.switch("a2")
    assert switcher.active == "a1"


def test_reading_an_adapter_keeps_nobody_waiting(folder, monkeypatch):
    switcher, slow, may_go_on = Switcher(Net(), folder), threading.Event(), threading.Event()
    switcher.switch("a0")
    load = SparseDelta.load

    def slowly(*args, **options):
        slow.set()
        assert may_go_on.wait(10)
        return load(*args, **options)

    monkeypatch.setattr(SparseDelta, "load", slowly)
    thread = threading.Thread(target=switcher.switch, args=("a1",))
    thread.start()
    assert slow.wait(10)
    with switcher.use("a0"):
        assert switcher.active == "a0"
    may_go_on.set()
    thread.join()
    assert switcher.active == "a1"


# --- refused ----------------------------------------------------------------------------------------------------------


def test_an_adapter_of_another_base_leaves_the_active_one(folder):
    model, stranger = Net(), make_delta(Net(seed=5))
    switcher = Switcher(model, {"a0": folder / "a0", "stranger": stranger})
    switcher.switch("a0", alpha=0.5)
    changed = copies(model)
    with pytest.raises(AdapterError, match="has other values than the base model"):
        switcher.switch("stranger")
    assert equal(model, changed) and switcher.active == "a0"


def test_a_failure_in_the_middle_of_a_switch_can_be_taken_back(monkeypatch):
    model = Net()
    before, switcher = copies(model), Switcher(model, family(model))
    switcher.switch("a0")
    fail_after(monkeypatch, 3, MemoryError)  # two writes take a0 out, one begins a1
    with pytest.raises(MemoryError):
        switcher.switch("a1")
    monkeypatch.undo()
    assert not equal(model, before)
    switcher.restore()
    assert equal(model, before)


@pytest.mark.parametrize("writes", [1, 3], ids=["taking out", "putting in"])
def test_after_a_failure_in_the_middle_the_same_adapter_is_put_in_anew(monkeypatch, writes):
    model = Net()
    switcher, expected = Switcher(model, family(model)), {}
    for name in ("a1", "a0"):
        switcher.switch(name)
        expected[name] = copies(model)
    fail_after(monkeypatch, writes, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        switcher.switch("a1")
    monkeypatch.undo()
    active = switcher.active
    assert not equal(model, expected[active])
    switcher.switch(active)
    assert equal(model, expected[active])


def test_names_that_are_not_there_or_taken_are_refused(folder, tmp_path):
    switcher = Switcher(Net(), folder)
    for call in (switcher.switch, switcher.prefetch, switcher.remove, lambda name: switcher.use(name).__enter__()):
        with pytest.raises(UnknownNameError, match="there is no adapter 'b'; there are a0, a1, a2"):
            call("b")
    with pytest.raises(AdapterError, match="there is an adapter 'a1' already"):
        switcher.add("a1", folder / "a1")
    with pytest.raises(AdapterError, match="holds no directories of adapters"):
        Switcher(Net(), tmp_path / "nothing")


def test_removing_the_active_one_brings_back_the_base(folder):
    model, before = Net(), copies(Net())
    switcher = Switcher(model, folder)
    switcher.switch("a1")
    switcher.remove("a1")
    assert equal(model, before) and switcher.active is None and switcher.names == ["a0", "a2"]


# --- threads ----------------------------------------------------------------------------------------------------------


def test_nobody_switches_under_a_running_forward():
    model = Net()
    deltas, base = family(model), copies(model)
    switcher, x = Switcher(model, deltas), torch.randn(4, 30)
    expected = {}
    for name, delta in deltas.items():
        saved = delta.apply_(model)
        expected[name] = model.first(x).detach()
        delta.restore_(model, saved)
    wrong = []

    def work(seed):
        order = random.Random(seed)
        for _ in range(60):
            name = order.choice(list(deltas))
            with switcher.use(name), torch.no_grad():
                first = model.first(x)
                time.sleep(0.0005 * order.random())
                if not (torch.equal(model.first(x), first) and torch.equal(first, expected[name])):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    switcher.restore()
    assert equal(model, base)


def test_a_thread_that_would_wait_for_itself_is_told():
    switcher = Switcher(Net(), family(Net()))
    with switcher.use("a0"):
        with switcher.use("a0"):
            pass
        for call in (lambda: switcher.switch("a1"), switcher.restore, lambda: switcher.use("a1").__enter__()):
            with pytest.raises(AdapterError, match=r"inside use\('a0'\)"):
                call()
    switcher.switch("a1")


def test_switching_waits_until_the_block_is_left():
    switcher, order = Switcher(Net(), family(Net())), []
    entered = threading.Event()

    def hold():
        with switcher.use("a0"):
            entered.set()
            time.sleep(0.05)
            order.append("left")

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait()
    switcher.switch("a1")
    order.append("switched")
    thread.join()
    assert order == ["left", "switched"] and switcher.active == "a1"


def test_readers_that_come_later_wait_behind_a_writer():
    switcher = Switcher(Net(), family(Net()))
    stop, order = threading.Event(), []
    switcher.switch("a0")

    def read():
        while not stop.is_set():
            with switcher.use("a0"):
                time.sleep(0.002)

    # two readers of one adapter that overlap: without a line the model would never be free
    readers = [threading.Thread(target=read) for _ in range(2)]
    for thread in readers:
        thread.start()
        time.sleep(0.001)
    writer = threading.Thread(target=lambda: (switcher.switch("a1"), order.append("switched")))
    writer.start()
    writer.join(10)
    stop.set()
    for thread in readers:
        thread.join()
    assert order == ["switched"]
