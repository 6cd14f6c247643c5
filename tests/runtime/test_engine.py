"""A mixed batch is its rows one by one, and each row is PEFT on the exported adapter."""

import threading

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, ViTConfig, ViTForImageClassification

from adapterbank.adapters import LoraAdapter
from adapterbank.bank import Bank
from adapterbank.errors import AdapterBankError, BankError, UnknownNameError
from adapterbank.runtime import AdapterEngine
from serving import alike, check_rows_one_by_one, exported, inputs_of, logits
from sparse import make_delta
from tiny_models import MODELS, TARGETS, adapters_for, bert, factors, layers_to_adapt, llama

KINDS = {
    "predictive": {"max_error": 0.1},
    "plain": {"k": 16, "quantize": False},
    "paper": {"method": "eigenlora", "k": 8},
    "flat": {"method": "flat", "k": 3},
}
# PEFT 0.21 sets it itself, and says so
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")


def vit():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    return ViTForImageClassification(config).eval()


def test_a_vision_model_is_served(tmp_path):
    model, batch = vit(), {"pixel_values": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))}
    bank = Bank.fit(adapters_for(model, ("q_proj", "fc1")), max_error=0.1)
    engine, base = AdapterEngine(model, bank), logits(vit(), batch)
    with engine.adapters(["a3", None, "a0"]):
        found = logits(model, batch)
    assert torch.equal(found[1], base[1])
    for row, member in ((0, "a3"), (2, "a0")):
        alike(found[row], logits(exported(bank, member, vit, tmp_path), batch)[row], base[row])


@pytest.fixture(scope="module")
def bank():
    return Bank.fit(adapters_for(llama(), TARGETS["llama"]), max_error=0.1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_row_is_peft_on_the_exported_adapter(name, kind, tmp_path):
    make = MODELS[name]
    model, batch = make(), inputs_of(name)
    bank = Bank.fit(adapters_for(model, TARGETS[name]), **KINDS[kind])
    engine = AdapterEngine(model, bank)
    base = logits(make(), batch)
    with engine.adapters(["a1", None, "a3", "a1"]):
        found = logits(model, batch)
    assert torch.equal(found[1], base[1])  # to the bit
    for row, member in ((0, "a1"), (2, "a3"), (3, "a1")):
        alike(found[row], logits(exported(bank, member, make, tmp_path), batch)[row], base[row])
    assert torch.equal(logits(model, batch), base)
    engine.close()
    assert not any(layer._forward_hooks for layer in model.modules())


def ragged(model):
    """Adapters of different ranks that miss modules."""
    layers = list(enumerate(layers_to_adapt(model, TARGETS["llama"])))
    return [
        LoraAdapter.from_factors(
            f"a{i}",
            {name: factors(d_in, d_out, i + 1, 100 * i + j) for j, (name, d_in, d_out) in layers if (i + j) % 3},
        )
        for i in range(5)
    ]


@pytest.fixture(scope="module")
def uneven():
    """An engine on members of different ranks that miss modules."""
    model = llama()
    return AdapterEngine(model, Bank.fit(ragged(model), max_error=0.2))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.sampled_from(["a0", "a1", "a2", "a3", "a4", None]), min_size=1, max_size=7),
    crossover=st.sampled_from([None, 1.0, 1000.0]),
)
def test_a_mixed_batch_is_its_rows_one_by_one(uneven, rows, crossover):
    for layer in uneven._layers.values():
        layer.crossover = crossover
    check_rows_one_by_one(uneven, rows)


@pytest.mark.parametrize("crossover", [1.0, 1000.0])
@pytest.mark.parametrize("k", [4, 12])
def test_what_the_basis_cannot_hold_is_added(bank, tmp_path, k, crossover):
    # on 4 directions nearly all is private
    model = llama()
    engine = AdapterEngine(model, bank, k=k, crossover=crossover)
    batch, base = inputs_of("llama"), logits(llama(), inputs_of("llama"))
    with engine.adapters(["a0", "a1", None, "a2"]):
        found = logits(model, batch)
    assert torch.equal(found[2], base[2])
    for row, member in ((0, "a0"), (1, "a1"), (3, "a2")):
        alike(found[row], logits(exported(bank, member, llama, tmp_path), batch)[row], base[row])
    assert engine.report().private_bytes > 0


def test_members_of_a_bank_fitted_with_k_alone_have_no_private_part():
    wide = nn.Sequential(nn.Linear(200, 200))
    members = [LoraAdapter.from_factors(f"a{i}", {"0": factors(200, 200, 4, i)}) for i in range(20)]
    bank = Bank.fit(members)
    advised = Bank.fit({name: bank.reconstruct(name) for name in bank.names}, k=64)
    for served, private in ((bank, True), (advised, False)):
        engine = AdapterEngine(wide, served)
        engine.load()
        assert bool(engine.report().private_work) == bool(engine.report().private_bytes) == private
        engine.close()


def test_generation_gives_the_tokens_of_each_adapter_alone(bank, tmp_path):
    model, ids = llama(), inputs_of("llama", 3)["input_ids"]
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    engine = AdapterEngine(model, bank)
    with engine.adapters(["a0", None, "a4"]):
        found = model.generate(ids, **options)
        beams = model.generate(ids, **options, num_beams=3)
    assert torch.equal(found[1], llama().generate(ids, **options)[1])
    for row, member in ((0, "a0"), (2, "a4")):
        tuned = exported(bank, member, llama, tmp_path)
        assert torch.equal(found[row], tuned.generate(input_ids=ids, **options)[row])
        assert torch.equal(beams[row], tuned.generate(input_ids=ids, **options, num_beams=3)[row])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-3), (torch.bfloat16, 0.3)], ids=str)
def test_updates_are_computed_in_the_model_s_type(bank, tmp_path, dtype, tolerance):
    model, batch = llama().to(dtype), inputs_of("llama")
    with AdapterEngine(model, bank).adapters(["a0", "a1", "a2", "a3"]):
        found = logits(model, batch)
    assert found.dtype == dtype
    base = logits(llama(), batch)
    for row in range(4):
        expected = logits(exported(bank, f"a{row}", llama, tmp_path), batch)
        alike(found[row].float(), expected[row], base[row], tolerance)


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.1), (16, 1e-3), (32, 1e-4)])
def test_bits_decide_how_near_a_member_is(bank, tmp_path, bits, tolerance):
    model, batch = llama(), inputs_of("llama")
    engine = AdapterEngine(model, bank, bits=bits)
    with engine.adapters(["a0"] * 4):
        found = logits(model, batch)
    alike(found, logits(exported(bank, "a0", llama, tmp_path), batch), logits(llama(), batch), tolerance)


# --- members ----------------------------------------------------------------------------------------------------------


def test_members_come_and_go_while_the_engine_runs(bank, tmp_path):
    model, batch = llama(), inputs_of("llama")
    engine = AdapterEngine(model, bank)
    new = adapters_for(llama(), TARGETS["llama"], n=7)[6]
    with engine.adapters(["a0", "a1", None, None]):
        before = logits(model, batch)
        engine.add(new)
        assert torch.equal(logits(model, batch), before)
    with engine.adapters(["a6", "a1", None, None]):
        found = logits(model, batch)
    new.save(tmp_path / "a6")
    expected = logits(PeftModel.from_pretrained(llama(), tmp_path / "a6").eval(), batch)
    alike(found[0], expected[0], logits(llama(), batch)[0])
    assert torch.equal(found[1], before[1])
    with pytest.raises(BankError, match="there is a member 'a6' already"):
        engine.add(new)
    engine.remove("a6")
    with pytest.raises(UnknownNameError, match="there is no member 'a6'; there are 5"), engine.adapters(["a6"]):
        pass
    with pytest.raises(UnknownNameError):
        engine.remove("a6")


def test_what_changes_in_the_bank_changes_in_the_engine():
    members = adapters_for(llama(), TARGETS["llama"], n=6)
    bank, batch = Bank.fit(members[:5], max_error=0.1), inputs_of("llama", 2)
    engine = AdapterEngine(llama(), bank)
    with engine.adapters(["a0", "a1"]):
        before = logits(engine.model, batch)
    bank.add(members[5])
    with engine.adapters(["a5", "a1"]):
        assert torch.equal(logits(engine.model, batch)[1], before[1])
    bank.rename("a0", "law")
    bank.remove("a1")
    with engine.adapters(["law", None]):
        torch.testing.assert_close(logits(engine.model, batch)[0], before[0], rtol=1e-4, atol=1e-5)
    for gone in ("a0", "a1"):
        with pytest.raises(UnknownNameError, match=f"no member '{gone}'"), engine.adapters([gone, gone]):
            pass


def test_a_block_that_cannot_begin_leaves_the_model_as_it_was(tmp_path):
    bank = Bank.fit(with_heads(tmp_path, (3, 2)), max_error=0.1)
    model, batch = bert(3), inputs_of("bert")
    model.classifier = nn.Sequential(nn.Linear(32, 3))  # no place for the members' heads
    engine, base = AdapterEngine(model, bank), logits(model, batch)
    for block in (engine.adapters(["h0"] * 4), engine.merged("h0")):
        with pytest.raises(BankError, match=r"brings classifier\.\w+, which the model has not"), block:
            pass
    assert torch.equal(logits(model, batch), base)


def test_the_one_used_longest_ago_leaves_when_memory_is_full(bank):
    engine = AdapterEngine(llama(), bank)
    engine.load()
    assert engine.report().members == 5
    one = engine._members.held[0].bytes
    limited, batch = AdapterEngine(llama(), bank, memory=2 * one + 1), inputs_of("llama", 1)
    for name in ("a0", "a1", "a0", "a2"):
        with limited.adapters([name]), engine.adapters([name]):
            assert torch.equal(logits(limited.model, batch), logits(engine.model, batch))
    assert [member.name for member in limited._members.held] == ["a0", "a2"]
    with limited.adapters(["a0", "a1", "a2", "a3", "a4"]):  # a batch needs all of its members
        assert logits(limited.model, inputs_of("llama", 5)).isfinite().all()


# --- task heads -------------------------------------------------------------------------------------------------------


def with_heads(tmp_path, labels):
    """Trained adapters of a text classifier, each with a head of its own."""
    found = []
    for i, count in enumerate(labels):
        torch.manual_seed(i)
        model = get_peft_model(bert(count), LoraConfig(target_modules=["query", "value"], task_type="SEQ_CLS", r=2))
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.data = 0.3 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / f"h{i}")
        found.append(tmp_path / f"h{i}")
    return found


def test_each_row_goes_through_its_own_task_head(tmp_path):
    bank = Bank.fit(with_heads(tmp_path, (3, 3, 2)), max_error=0.1)
    model, batch = bert(3), inputs_of("bert")
    engine = AdapterEngine(model, bank)
    base = logits(bert(3), batch)
    with engine.adapters(["h0", "h2", None, "h1"]):
        found = logits(model, batch)
    assert torch.equal(found[2], base[2])
    for row, member, count in ((0, "h0", 3), (1, "h2", 2), (3, "h1", 3)):
        expected = logits(exported(bank, member, lambda count=count: bert(count), tmp_path / "out"), batch)[row]
        torch.testing.assert_close(found[row, :count], expected, rtol=1e-3, atol=1e-4)
        assert (found[row, count:] == -torch.inf).all()
    assert torch.equal(logits(model, batch), base)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_merged_member_serves_every_row_and_leaves_every_bit(name, tmp_path):
    make = MODELS[name]
    model, batch = make(), inputs_of(name)
    bank = Bank.fit(adapters_for(model, TARGETS[name]), max_error=0.1)
    engine, before = AdapterEngine(model, bank), {n: p.clone() for n, p in model.named_parameters()}
    with engine.merged("a1"):
        found = logits(model, batch)
    alike(found, logits(exported(bank, "a1", make, tmp_path), batch), logits(make(), batch))
    assert all(torch.equal(parameter, before[n]) for n, parameter in model.named_parameters())


def test_a_merged_member_brings_its_head(tmp_path):
    bank = Bank.fit(with_heads(tmp_path, (3, 2)), max_error=0.1)
    model, batch = bert(3), inputs_of("bert")
    engine = AdapterEngine(model, bank)
    with engine.merged("h1"):
        found = logits(model, batch)
    expected = logits(exported(bank, "h1", lambda: bert(2), tmp_path / "out"), batch)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(logits(model, batch), logits(bert(3), batch))


@pytest.mark.parametrize("key", ["lm_head.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("tied", [False, True])
def test_beams_of_a_row_go_through_its_own_word_vectors(key, tied):
    def make():
        model = llama()
        if tied:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model

    model, ids, plain = make(), inputs_of("llama", 3)["input_ids"], adapters_for(llama(), TARGETS["llama"])
    members = [
        LoraAdapter.from_factors(
            adapter.name, {name: adapter.factors(name) for name in adapter.modules}, extras={key: torch.randn(50, 32)}
        )
        for adapter in plain
    ]
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3}
    base = make().generate(ids, **options)
    with AdapterEngine(model, Bank.fit(members, k=16)).adapters(["a2", None, "a4"]):
        found = model.generate(ids, **options)
    assert torch.equal(found[1], base[1])
    for row, i in ((0, 2), (2, 4)):
        alone = make()
        alone.get_submodule(key.removesuffix(".weight")).weight = nn.Parameter(members[i].extra(key))
        with AdapterEngine(alone, Bank.fit(plain, k=16)).adapters([f"a{i}"] * 3):
            expected = alone.generate(ids, **options)
        assert torch.equal(found[row], expected[row]) and not torch.equal(found[row], base[row])


def test_a_head_of_which_a_part_is_trained_follows_the_model():
    members = [
        LoraAdapter.from_factors(
            adapter.name,
            {name: adapter.factors(name) for name in adapter.modules},
            extras={"classifier.bias": torch.arange(3.0)},
        )
        for adapter in adapters_for(bert(), TARGETS["bert"])
    ]
    bank, batch = Bank.fit(members, max_error=0.1), inputs_of("bert", 2)
    engine, found = AdapterEngine(bert(), bank), []
    fresh = bert().double()
    fresh.classifier.weight.data *= 2
    for _ in range(2):
        with engine.adapters(["a1", None]):
            found.append(logits(engine.model, batch))
        engine.model.load_state_dict(fresh.double().state_dict())
        engine.model.double()
    with AdapterEngine(fresh, bank).adapters(["a1", None]):
        expected = logits(fresh, batch)
    torch.testing.assert_close(found[1], expected, rtol=1e-5, atol=1e-6)


def test_a_quantised_head_is_refused(tmp_path):
    bank, model, batch = Bank.fit(with_heads(tmp_path, (3, 3)), max_error=0.1), bert(3), inputs_of("bert")
    engine = AdapterEngine(model, bank)
    model.classifier.weight = nn.Parameter(torch.zeros(3, 32, dtype=torch.int8), requires_grad=False)
    for block in (engine.adapters(["h0"] * 4), engine.merged("h0")):
        with (
            pytest.raises(BankError, match="Linear, a head of members, is quantised; load the base with it as it is"),
            block,
        ):
            pass
    model.classifier = bert(3).classifier
    assert torch.equal(logits(model, batch), logits(bert(3), batch))


# --- refused ----------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_and_leaves_the_model_as_it_was(bank, tmp_path):
    with pytest.raises(BankError, match=r"the model has no layer .*q_proj; is it the bank's base, tiny/base\?"):
        AdapterEngine(bert(), bank)
    model = llama()
    engine, batch = AdapterEngine(model, bank), inputs_of("llama")
    with (
        pytest.raises(AdapterBankError, match="a layer sees 4 rows in a batch of 3 adapters"),
        engine.adapters(["a0"] * 3),
    ):
        logits(model, batch)
    layers = layers_to_adapt(llama(), ("o_proj",))
    stranger = LoraAdapter.from_factors("other", {name: factors(d, e, 2, 0) for name, d, e in layers})
    with pytest.raises(BankError, match=r"'other': the engine has no layer .*o_proj"):
        engine.add(stranger)
    assert torch.equal(logits(model, batch), logits(llama(), batch)) and engine.names == list(bank.names)


def test_layers_of_another_size_are_refused_before_any_is_touched():
    members = [LoraAdapter.from_factors(f"a{i}", {"0": factors(20, 30, 2, i)}) for i in range(3)]
    bank, model = Bank.fit(members, max_error=0.05), nn.Sequential(nn.Linear(20, 31))
    with pytest.raises(BankError, match="0: the model's layer is 31 x 20, the bank's 30 x 20; is it the bank's base"):
        AdapterEngine(model, bank)
    with pytest.raises(BankError, match="8, 16 or 32 bits a value, not 4"):
        AdapterEngine(nn.Sequential(nn.Linear(20, 30)), bank, bits=4)
    assert not model[0]._forward_hooks


def test_a_part_of_a_model_that_several_modules_fit_is_refused():
    names = [f"{part}.layer.q" for part in ("encoder", "decoder")]
    members = [
        LoraAdapter.from_factors(f"a{i}", {name: factors(8, 8, 2, 2 * i + j) for j, name in enumerate(names)})
        for i in range(3)
    ]
    part = nn.ModuleDict({"layer": nn.ModuleDict({"q": nn.Linear(8, 8)})})
    with pytest.raises(BankError, match="several modules of the bank fit one layer of the model"):
        AdapterEngine(part, Bank.fit(members, max_error=0.05))


def test_a_closed_engine_serves_nobody(bank):
    model, batch = llama(), inputs_of("llama")
    engine = AdapterEngine(model, bank)
    with engine.adapters(["a0"] * 4):
        engine.close()
    engine.close()
    for block in (engine.adapters(["a0"] * 4), engine.merged("a0")):
        with pytest.raises(BankError, match="the engine is closed"), block:
            pass
    assert torch.equal(logits(model, batch), logits(llama(), batch))


def test_rows_inside_rows_hold_until_they_end(bank):
    model, batch, found = llama(), inputs_of("llama"), {}
    engine = AdapterEngine(model, bank)
    for name in ("a0", "a1"):
        with engine.adapters(name for name in [name] * 4):
            found[name] = logits(model, batch)
    with engine.adapters(["a0"] * 4):
        with engine.adapters(["a1"] * 4):
            assert torch.equal(logits(model, batch), found["a1"])
        with engine.merged("a1"):
            torch.testing.assert_close(logits(model, batch), found["a1"], rtol=1e-4, atol=1e-5)
        with pytest.raises(RuntimeError, match="by the caller"), engine.adapters(["a1"] * 4):
            raise RuntimeError("by the caller")
        assert torch.equal(logits(model, batch), found["a0"])
    assert torch.equal(logits(model, batch), logits(llama(), batch))


def test_nothing_is_served_on_top_of_merged_weights(bank):
    model, batch = llama(), inputs_of("llama")
    engine = AdapterEngine(model, bank)
    with engine.merged("a1"):
        found = logits(model, batch)
        for block in (engine.merged("a0"), engine.adapters(["a0"] * 4)):
            with pytest.raises(BankError, match="member 'a1' is in the weights; end its block first"), block:
                pass
        assert torch.equal(logits(model, batch), found)
    with engine.merged("a1"):
        assert torch.equal(logits(model, batch), found)


def test_blocks_that_overlap_say_so_and_leave_the_model_as_it_was(bank):
    model, batch = llama(), inputs_of("llama")
    engine = AdapterEngine(model, bank)

    def served(block):
        with block:
            yield logits(model, batch)

    for second in (engine.adapters(["a1"] * 4), engine.merged("a1")):
        blocks = [served(engine.adapters(["a0"] * 4)), served(second)]
        for block in blocks:
            next(block)
        for block in blocks:
            with pytest.raises(BankError, match="blocks of one thread overlap; end the one that began last first"):
                next(block)
        assert torch.equal(logits(model, batch), logits(llama(), batch))
    with engine.adapters(["a0"] * 4):
        assert not torch.equal(logits(model, batch), logits(llama(), batch))


def test_a_weight_of_two_layers_is_not_merged_into():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    members = [LoraAdapter.from_factors(f"a{i}", {"1": factors(8, 8, 2, i)}) for i in range(3)]
    engine, before = AdapterEngine(model, Bank.fit(members, max_error=0.05)), model[0].weight.clone()
    with (
        pytest.raises(BankError, match=r"0\.weight and 1\.weight are one tensor: .* serve by rows"),
        engine.merged("a0"),
    ):
        pass
    assert torch.equal(model[0].weight, before)


class Routed(nn.Module):
    """Every token goes to the expert that likes it most."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.router, self.experts = nn.Linear(8, 2), nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x):
        tokens, found = x.reshape(-1, 8), torch.zeros(x.numel() // 8, 8)
        chosen = self.router(tokens).argmax(1)
        for i, expert in enumerate(self.experts):
            found[chosen == i] = expert(tokens[chosen == i])
        return found.view(x.shape)


def test_experts_are_merged_into_and_not_served_by_rows():
    members = [
        LoraAdapter.from_factors(f"a{i}", {f"experts.{j}": factors(8, 8, 2, 2 * i + j) for j in range(2)})
        for i in range(3)
    ]
    model, x = Routed(), torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    bank = Bank.fit(members, max_error=0.05)
    engine, base, plain = AdapterEngine(model, bank), model(x), Routed()
    with pytest.raises(BankError, match=r"experts\.0 gets tokens of any rows"), engine.adapters(["a0", "a1"]):
        pass
    for j, expert in enumerate(plain.experts):
        update = bank.reconstruct("a0").factors(f"experts.{j}")
        expert.weight.data += update.scale * update.B @ update.A
    with engine.merged("a0"):
        torch.testing.assert_close(model(x), plain(x), rtol=1e-3, atol=1e-4)
    assert torch.equal(model(x), base)


def test_another_thread_waits_for_the_block_to_end(bank):
    model, batch = llama(), inputs_of("llama", 2)
    engine, found = AdapterEngine(model, bank), {}
    expected = {}
    for name in ("a0", "a1"):
        with engine.adapters([name, name]):
            expected[name] = logits(model, batch)

    def work(name):
        for _ in range(10):
            with engine.adapters([name, name]):
                found.setdefault(name, []).append(logits(model, batch))

    threads = [threading.Thread(target=work, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, expected[name]) for name, several in found.items() for one in several)


# --- models of every kind ---------------------------------------------------------------------------------------------


def test_a_compiled_model_serves_other_rows_without_compiling_again(bank, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its checks can't be traced
    model, batch = llama(), inputs_of("llama")
    engine = AdapterEngine(model, bank)
    counted = CompileCounter()
    compiled = torch.compile(model, backend=counted)
    for rows in (["a0", "a1", "a2", "a3"], ["a3", "a3", "a4", "a0"], ["a1"] * 4):
        with engine.adapters(rows):
            expected = logits(model, batch)
            torch.testing.assert_close(logits(compiled, batch), expected, rtol=1e-5, atol=1e-6)
    assert counted.frame_count == 1
    torch.testing.assert_close(logits(compiled, batch), logits(llama(), batch), rtol=1e-5, atol=1e-6)


def test_a_model_that_was_compiled_before_is_served(tmp_path, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its checks can't be traced
    bank, batch = Bank.fit(with_heads(tmp_path, (3, 3)), max_error=0.1), inputs_of("bert")
    model = bert(3)
    compiled = torch.compile(model, backend=CompileCounter())
    logits(compiled, batch)
    engine = AdapterEngine(model, bank)
    # its heads are hooked when they're first asked for
    for rows in ([None] * 4, ["h0", None, "h1", "h0"]):
        with engine.adapters(rows):
            torch.testing.assert_close(logits(compiled, batch), logits(model, batch), rtol=1e-5, atol=1e-6)


def test_quantised_layers_are_called_and_never_read(bank, tmp_path):
    pytest.importorskip("bitsandbytes")
    llama().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=True)
    served, plain = (
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config).eval() for _ in range(2)
    )
    batch = inputs_of("llama")
    engine, base = AdapterEngine(served, bank), logits(plain, batch)
    with engine.adapters(["a0", None, "a1", "a1"]):
        found = logits(served, batch)
    assert torch.equal(found[1], base[1])
    whole = AdapterEngine(llama(), bank)
    with whole.adapters(["a0", None, "a1", "a1"]):
        expected = logits(whole.model, batch)
    # the quantisation's own error is that of the base model
    error = float((base - logits(llama(), batch)).abs().max())
    assert float((found - expected).abs().max()) < 5 * error
    with pytest.raises(BankError, match="is quantised, so nothing can be merged into it"), engine.merged("a0"):
        pass


class Wrapped(nn.Module):
    """A linear layer of another library: no ``nn.Linear``, but weights like its."""

    in_features = out_features = 30

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(30, 30))

    def forward(self, x):
        return x @ self.weight.T


def test_a_linear_layer_of_another_library_is_merged_into():
    members = [LoraAdapter.from_factors(f"a{i}", {"0": factors(30, 30, 2, i)}) for i in range(3)]
    model, x = nn.Sequential(Wrapped()), torch.randn(2, 30)
    engine = AdapterEngine(model, Bank.fit(members, max_error=0.05))
    with engine.adapters(["a1", "a1"]):
        expected = model(x)
    with engine.merged("a1"):
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    engine.add(make_delta(model, only=["0.weight"], name="sparse"))
    with engine.adapters(["sparse", "sparse"]):
        expected = model(x)
    with engine.merged("sparse"):
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_quantised_layer_needs_no_weight():
    class Codes(nn.Module):
        """A layer as other libraries quantise it."""

        in_features, out_features = 20, 30

        def __init__(self):
            super().__init__()
            self.register_buffer("qweight", torch.arange(600, dtype=torch.int8).view(30, 20))

        def forward(self, x):
            return x @ self.qweight.to(x).T

    model, x = nn.Sequential(Codes()), torch.randn(2, 20)
    members = [LoraAdapter.from_factors(f"a{i}", {"0": factors(20, 30, 2, i)}) for i in range(3)]
    bank, base = Bank.fit(members, max_error=0.05), model(x)
    engine = AdapterEngine(model, bank)
    with engine.adapters([None, "a1"]):
        found = model(x)
    assert torch.equal(found[0], base[0])
    update = bank.reconstruct("a1").factors("0")
    torch.testing.assert_close(found[1] - base[1], update.B @ update.A @ x[1] * update.scale, rtol=1e-2, atol=1e-3)
    with pytest.raises(BankError, match="Codes is quantised"), engine.merged("a1"):
        pass


def test_a_plain_module_of_linear_layers_is_served():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 10))
    members = [
        LoraAdapter.from_factors(f"a{i}", {"0": factors(20, 30, 2, i), "2": factors(30, 10, 2, 10 + i)})
        for i in range(3)
    ]
    bank, x = Bank.fit(members, max_error=0.05), torch.randn(3, 20)
    engine, base = AdapterEngine(model, bank), model(x)
    with engine.adapters(["a2", None, "a0"]):
        found = model(x)
    assert torch.equal(found[1], base[1])
    for row, name in ((0, "a2"), (2, "a0")):
        with engine.merged(name):
            torch.testing.assert_close(found[row], model(x)[row], rtol=1e-4, atol=1e-5)
