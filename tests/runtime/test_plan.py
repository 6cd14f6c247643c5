"""What is planned is what is held."""

import pytest
import torch
from torch import nn

from adapterbank.adapters import LoraAdapter
from adapterbank.bank import Bank
from adapterbank.runtime import AdapterEngine
from adapterbank.runtime.plan import SAMPLE, plan
from tiny_models import TARGETS, adapters_for, bert, factors, llama


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("kind", [{"max_error": 0.1}, {"k": 16, "quantize": False}], ids=str)
def test_the_plan_is_what_the_engine_holds(kind, bits):
    bank = Bank.fit(adapters_for(llama(), TARGETS["llama"], n=SAMPLE), **kind)
    engine = AdapterEngine(llama(), bank, bits=bits)
    engine.load()
    report, planned = engine.report(), plan(bank, bits=bits)
    for name in ("members", "basis_bytes", "shared_bytes", "private_bytes", "head_bytes"):
        assert getattr(planned, name) == getattr(report, name)
    assert planned.full_bytes == 2 * sum(bank[name].values for name in bank.names)
    larger = plan(bank, bits=bits, members=10 * len(bank))
    assert (larger.members, larger.basis_bytes) == (10 * len(bank), planned.basis_bytes)
    assert larger.shared_bytes == 10 * planned.shared_bytes and larger.full_bytes == 10 * planned.full_bytes


def test_a_sample_stands_for_all():
    bank = Bank.fit(adapters_for(bert(), TARGETS["bert"], n=3 * SAMPLE), max_error=0.2)
    engine = AdapterEngine(bert(), bank)
    engine.load()
    assert plan(bank).sampled == SAMPLE
    assert plan(bank).bytes == pytest.approx(
        sum(m.bytes for m in engine._members.held) + engine.report().basis_bytes, rel=0.05
    )


def test_a_model_without_weights_can_be_planned_for():
    with torch.device("meta"):
        model = nn.ModuleDict({"q": nn.Linear(64, 64), "v": nn.Linear(64, 64)})
    adapters = [
        LoraAdapter.from_factors(f"a{i}", {name: factors(64, 64, 4, 10 * i + j) for j, name in enumerate("qv")})
        for i in range(6)
    ]
    engine = AdapterEngine(model, Bank.fit(adapters, k=8, quantize=False))
    engine.load()
    assert engine.report().private_bytes == 0
    # 4 coefficients of each of 8 directions a side, and a step for each of 4 rows
    assert engine.report().shared_bytes == 6 * 2 * 2 * (4 * 8 * 2 + 4 * 4)
