"""Members in the form in which they're served, on disk."""

import pytest
import torch

from adapterbank.bank import Bank
from adapterbank.errors import BankError
from adapterbank.runtime import AdapterEngine
from serving import inputs_of, logits
from tiny_models import TARGETS, adapters_for, bert, llama


@pytest.fixture(scope="module")
def bank():
    return Bank.fit(adapters_for(llama(), TARGETS["llama"]), max_error=0.1)


def served(engine, rows=("a0", None, "a3")):
    with engine.adapters(rows):
        return logits(engine.model, inputs_of("llama", len(rows)))


@pytest.mark.parametrize("options", [{}, {"bits": 32}, {"bits": 8}, {"k": 4}], ids=str)
def test_a_member_off_the_shelf_is_the_same_bit_for_bit(bank, tmp_path, options, monkeypatch):
    expected = served(AdapterEngine(llama(), bank, **options))
    first = AdapterEngine(llama(), bank, **options, cache=tmp_path)
    assert torch.equal(served(first), expected)
    assert len(list(tmp_path.iterdir())) == 2
    again = AdapterEngine(llama(), bank, **options, cache=tmp_path)
    monkeypatch.setattr(bank, "reconstruct", None)  # whoever decodes fails
    assert torch.equal(served(again), expected)
    assert again.report() == first.report()


def test_what_left_the_memory_comes_back_off_the_shelf(bank, tmp_path, monkeypatch):
    engine = AdapterEngine(llama(), bank, memory=1, cache=tmp_path)
    engine.load()
    assert engine.report().members == 1 and len(list(tmp_path.iterdir())) == 5
    expected = served(AdapterEngine(llama(), bank))
    monkeypatch.setattr(bank, "reconstruct", None)  # whoever decodes fails
    for _ in range(3):
        assert torch.equal(served(engine), expected)


def test_members_of_another_basis_or_width_are_others(bank, tmp_path):
    for options in ({}, {"k": 8}, {"bits": 8}):
        served(AdapterEngine(llama(), bank, cache=tmp_path, **options), ["a0"])
    renamed = Bank.fit(adapters_for(llama(), TARGETS["llama"]), max_error=0.1)
    renamed.rename("a0", "law")
    served(AdapterEngine(llama(), renamed, cache=tmp_path), ["law"])
    assert len(list(tmp_path.iterdir())) == 3  # a new name is no other member


def test_a_damaged_file_is_made_again(bank, tmp_path):
    expected = served(AdapterEngine(llama(), bank, cache=tmp_path), ["a0"])
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[:-7], b"\xff" * 40 + whole[40:], whole.replace(b"q_proj", b"x_proj")):
        path.write_bytes(damaged)
        assert torch.equal(served(AdapterEngine(llama(), bank, cache=tmp_path), ["a0"]), expected)
        assert path.read_bytes() == whole


def test_task_heads_are_on_the_shelf_too(tmp_path):
    members = adapters_for(bert(), TARGETS["bert"])
    for i, member in enumerate(members):
        head = {"classifier.weight": torch.full((3, 32), float(i)), "classifier.bias": torch.arange(3.0)}
        members[i] = type(member).from_factors(
            member.name, {name: member.factors(name) for name in member.modules}, extras=head
        )
    bank, batch = Bank.fit(members, max_error=0.1), inputs_of("bert")
    found = []
    for _ in range(2):
        engine = AdapterEngine(bert(), bank, cache=tmp_path)
        with engine.adapters(["a2", None, "a4", "a0"]):
            found.append(logits(engine.model, batch))
    assert torch.equal(*found)


def test_a_place_that_takes_no_files_is_named(bank, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BankError, match=r"file.* can't be made: .*; give cache= another place"):
        AdapterEngine(llama(), bank, cache=tmp_path / "file" / "cache")
