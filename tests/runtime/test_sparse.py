"""Rows with sparse adapters are those of a model that was switched, in any mix."""

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel, ShiraConfig, get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounter

from adapterbank.bank import Bank
from adapterbank.errors import AdapterError, BankError
from adapterbank.runtime import AdapterEngine
from adapterbank.shira import SparseDelta
from serving import alike, check_rows_one_by_one, inputs_of, logits
from sparse import make_delta
from tiny_models import MODELS, TARGETS, adapters_for, bert, layers_to_adapt, llama


def deltas_of(model, targets, n=3):
    """Sparse adapters of a model that miss some layers."""
    names = [f"{name}.weight" for name, _, _ in layers_to_adapt(model, targets)]
    return [
        make_delta(model, seed=i, density=0.2, scale=0.3, only=names[i % 2 :], name=f"s{i}", base="tiny/base")
        for i in range(n)
    ]


def switched(make, delta, batch):
    """Logits of a model that the adapter was put into."""
    model = make()
    delta.apply_(model)
    return logits(model, batch)


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_sparse_adapters_are_those_of_a_switched_model(name):
    make, batch = MODELS[name], inputs_of(name, 6)
    model, base = make(), logits(make(), batch)
    bank = Bank.fit(adapters_for(model, TARGETS[name]), max_error=0.1)
    engine, deltas = AdapterEngine(model, bank), deltas_of(make(), TARGETS[name])
    for delta in deltas:
        engine.add(delta)
    rows = ["s0", "a1", None, "s2", "s0", "s1"]
    with engine.adapters(rows):
        found = logits(model, batch)
    assert torch.equal(found[2], base[2])  # to the bit
    for row, delta in ((0, 0), (3, 2), (4, 0), (5, 1)):
        torch.testing.assert_close(found[row], switched(make, deltas[delta], batch)[row], rtol=1e-4, atol=1e-5)
    with engine.adapters(["a1"] * 6):
        torch.testing.assert_close(found[1], logits(model, batch)[1], rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(model, batch), base)
    assert engine.report().sparse_bytes == sum(
        u.positions.nbytes + u.values.nbytes for delta in deltas for u in delta.updates.values()
    )
    engine.close()
    assert not any(layer._forward_hooks for layer in model.modules())


@pytest.fixture(scope="module")
def mixed():
    """An engine on members of a bank and sparse adapters."""
    model = llama()
    engine = AdapterEngine(model, Bank.fit(adapters_for(model, TARGETS["llama"]), max_error=0.1))
    for delta in deltas_of(llama(), TARGETS["llama"]):
        engine.add(delta)
    return engine


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.sampled_from(["a0", "a1", "s0", "s1", "s2", None]), min_size=1, max_size=7))
def test_a_mixed_batch_is_its_rows_one_by_one(mixed, rows):
    check_rows_one_by_one(mixed, rows)


def test_an_engine_needs_no_bank_to_serve_sparse_adapters(tmp_path):
    deltas, model, batch = deltas_of(llama(), TARGETS["llama"]), llama(), inputs_of("llama", 3)
    engine = AdapterEngine(model)
    for delta in deltas[:2]:
        delta.save(tmp_path / delta.name)
        engine.add(tmp_path / delta.name)
    assert engine.names == ["s0", "s1"]
    with engine.adapters(["s1", None, "s0"]):
        found = logits(model, batch)
        tokens = model.generate(batch["input_ids"], max_new_tokens=6, do_sample=False)
    for row, name in ((0, "s1"), (2, "s0")):
        delta = SparseDelta.load(tmp_path / name)  # it was rounded to 16 bits
        torch.testing.assert_close(found[row], switched(llama, delta, batch)[row], rtol=1e-4, atol=1e-5)
        alone = llama()
        delta.apply_(alone)
        assert torch.equal(tokens[row], alone.generate(batch["input_ids"], max_new_tokens=6, do_sample=False)[row])
    lora = adapters_for(llama(), TARGETS["llama"], n=1)[0]
    with pytest.raises(BankError, match=r"'a0': the engine has no layer .*q_proj"):
        engine.add(lora)


# torch says it about PEFT's own SHiRA
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_a_sparse_adapter_of_peft_is_served(tmp_path):
    torch.manual_seed(1)
    trained = get_peft_model(llama(), ShiraConfig(r=2, target_modules=["q_proj"], init_weights=False))
    trained.save_pretrained(tmp_path / "shira")
    model, batch = llama(), inputs_of("llama", 2)
    engine, base = AdapterEngine(model), logits(llama(), batch)
    engine.add(tmp_path / "shira")
    with engine.adapters(["shira", None]):
        found = logits(model, batch)
    expected = logits(PeftModel.from_pretrained(llama(), tmp_path / "shira").eval(), batch)
    alike(found[0], expected[0], base[0])
    assert torch.equal(found[1], base[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_is_a_switch_and_leaves_every_bit(dtype):
    delta, model, batch = deltas_of(llama(), TARGETS["llama"])[0], llama().to(dtype), inputs_of("llama")
    engine, before = AdapterEngine(model), {n: p.clone() for n, p in model.named_parameters()}
    engine.add(delta)
    with engine.merged("s0"):
        assert torch.equal(logits(model, batch), switched(lambda: llama().to(dtype), delta, batch))
    assert all(torch.equal(parameter, before[n]) for n, parameter in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_rows_keep_the_model_s_type(dtype):
    delta, model, batch = deltas_of(llama(), TARGETS["llama"])[0], llama().to(dtype), inputs_of("llama", 2)
    engine = AdapterEngine(model)
    engine.add(delta)
    with engine.adapters(["s0", None]):
        found = logits(model, batch)
    assert found.dtype == dtype
    expected, base = switched(llama, delta, batch)[0], logits(llama(), batch)[0]
    alike(found[0].float(), expected, base, 1e-3 if dtype == torch.float64 else 0.3)


def test_rows_are_served_under_autocast():
    delta, model, batch = deltas_of(llama(), TARGETS["llama"])[0], llama(), inputs_of("llama", 2)
    engine = AdapterEngine(model)
    engine.add(delta)
    with engine.adapters(["s0", None]), torch.autocast("cpu", torch.bfloat16):
        found, base = logits(model, batch), logits(llama(), batch)
    assert torch.equal(found[1], base[1])
    alike(found[0].float(), switched(llama, delta, batch)[0], logits(llama(), batch)[0], 0.3)


def test_a_sparse_adapter_brings_its_head():
    torch.manual_seed(3)
    head = {"classifier.weight": torch.randn(3, 32), "classifier.bias": torch.randn(3)}
    delta = make_delta(bert(), only=["bert.encoder.layer.0.attention.self.query.weight"], name="s0", extras=head)
    model, batch = bert(), inputs_of("bert", 2)
    engine, base = AdapterEngine(model), logits(bert(), batch)
    engine.add(delta)
    expected = switched(bert, delta, batch)
    with engine.adapters([None, "s0"]):
        found = logits(model, batch)
    assert torch.equal(found[0], base[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)
    with engine.merged("s0"):
        torch.testing.assert_close(logits(model, batch), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(logits(model, batch), base)


def test_a_compiled_model_serves_sparse_adapters(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its checks can't be traced
    model, batch = llama(), inputs_of("llama", 3)
    engine = AdapterEngine(model)
    for delta in deltas_of(llama(), TARGETS["llama"]):
        engine.add(delta)
    compiled = torch.compile(model, backend=CompileCounter())
    logits(compiled, batch)  # layers are hooked when they're first asked for
    for rows in (["s0", None, "s1"], ["s2", "s0", "s2"]):
        with engine.adapters(rows):
            torch.testing.assert_close(logits(compiled, batch), logits(model, batch), rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_refused():
    engine = AdapterEngine(llama())
    name = "model.layers.0.self_attn.q_proj.weight"
    shaped = SparseDelta.from_tensors({name: (torch.tensor([3]), torch.ones(1))}, {name: (16, 16)}, name="narrow")
    with pytest.raises(BankError, match=r"'narrow', .*q_proj.weight: it is \(16, 16\), the model's layer \(32, 32\)"):
        engine.add(shaped)
    embedding = make_delta(llama(), only=["model.embed_tokens.weight"], name="words")
    with pytest.raises(BankError, match=r"embed_tokens\.weight is of no linear layer of the model; use it with"):
        engine.add(embedding)
    delta = deltas_of(llama(), TARGETS["llama"])[0]
    other = llama()
    other.get_parameter(name).data += 1e-3
    with pytest.raises(AdapterError, match="has other values than the base model it was made for, tiny/base"):
        AdapterEngine(other).add(delta)
    assert engine.names == []
    assert not any(layer._forward_hooks for layer in engine.model.modules())
    plain = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(BankError, match="of no linear layer"):
        AdapterEngine(plain).add(delta)
