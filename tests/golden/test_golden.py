"""Banks written by the first version that wrote format 1: every later reader must see the same values."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapterbank.bank import Bank

HERE = Path(__file__).parent
every_case = pytest.mark.parametrize("case", sorted(p.parent.name for p in HERE.glob("*/bank.json")))


@every_case
def test_an_old_bank_decodes_to_the_same_values(case):
    bank = Bank.load(HERE / case)
    found = {}
    for name in bank.names:
        restored = bank.reconstruct(name)
        assert restored.extra("score.weight").shape == (2, 24)
        for module in restored.modules:
            factors = restored.factors(module)
            found |= {f"{name}|{module}|A": factors.A, f"{name}|{module}|B": factors.B * factors.scale}
    expected = load_file(HERE / case / "expected.safetensors")
    assert found.keys() == expected.keys()
    keys = {key.rsplit("|", 1)[0] for key in found}
    for key in keys:
        # as updates: in the plain codings A and B come from an SVD, whose signs are the platform's
        ours, theirs = (values[f"{key}|B"] @ values[f"{key}|A"] for values in (found, expected))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * float(theirs.abs().max()) + 1e-12)


@every_case
def test_an_old_bank_can_be_changed(case, tmp_path):
    directory = shutil.copytree(HERE / case, tmp_path / "bank")
    (directory / "expected.safetensors").unlink()
    with Bank.edit(directory) as bank:
        again = bank.reconstruct("golden_000")
        bank.remove("golden_000")
        bank.add(again)
    assert Bank.load(directory)["golden_000"].error < 0.2


def test_the_golden_banks_are_small():
    for case in {p.parent for p in HERE.glob("*/bank.json")}:
        assert sum(p.stat().st_size for p in case.iterdir()) < 16_000


def test_there_is_one_of_each_coding():
    banks = [Bank.load(p.parent) for p in HERE.glob("*/bank.json")]
    assert {bank.index.coding for bank in banks} >= {"predictive", "int16"}
    assert {bank[name].task.coded for bank in banks for name in bank.names if bank[name].task} == {True, False}
