"""What adapters of a bank do beside what every method does (``tests/test_battery.py``)."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model

from adapterbank.adapters import LoraAdapter
from adapterbank.errors import AdapterBankError, UnknownNameError
from adapterbank.tuner import export_lora, load
from tiny_models import ROWS, adapter_layers, bert, eigen, gpt2, llama, perturb, t5

CLOSE = {"rtol": 1e-5, "atol": 2e-6}


@pytest.fixture(params=ROWS)
def fields(request):
    return ROWS[request.param]


@pytest.fixture
def model(bank_dir, fields):
    """A causal model with an adapter as if trained."""
    return perturb(get_peft_model(llama(), eigen(bank_dir, task_type="CAUSAL_LM", **fields))).eval()


def logits(model, inputs, **kwargs):
    with torch.no_grad():
        return model(**inputs, **kwargs).logits


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_step_through_the_layers_is_one_on_the_explicit_factors(model):
    # the same gradient as autograd finds for dW, by the chain rule through A' and B'
    layer = adapter_layers(model)[0]
    x = torch.randn(20, layer.in_features)
    layer.eval()
    out = layer(x) - layer.base_layer(x)
    A, B = layer.factors("default")
    torch.testing.assert_close(out, x @ A.T @ B.T, rtol=1e-4, atol=1e-5)
    weights = [p for p in layer.parameters() if p.requires_grad]
    one = torch.autograd.grad(layer(x).square().sum(), weights)
    other = torch.autograd.grad((layer.base_layer(x) + x @ A.T @ B.T).square().sum(), weights)
    for ours, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_few_tokens_and_many_give_the_same(model):
    layer = adapter_layers(model)[0]
    layer.eval()
    x = torch.randn(64, layer.in_features)
    with torch.no_grad():
        one_by_one = torch.cat([layer(row[None]) for row in x])
        torch.testing.assert_close(layer(x), one_by_one, rtol=1e-4, atol=1e-5)


# --- saving and loading -----------------------------------------------------------------------------------------------


def test_our_loader_gives_the_same(model, inputs, tmp_path, bank_dir):
    model.save_pretrained(tmp_path / "task")
    loaded = load(llama(), tmp_path / "task", bank=bank_dir)
    assert not any(p.requires_grad for p in loaded.parameters())
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs), rtol=0, atol=0)


def test_the_config_names_no_path(model, tmp_path, bank_dir):
    model.save_pretrained(tmp_path / "task")
    text = (tmp_path / "task" / "adapter_config.json").read_text()
    assert json.loads(text)["bank"] == bank_dir.name
    assert str(bank_dir.parent) not in text


def test_it_brings_its_basis_along_if_told_to(bank_dir, inputs, tmp_path, fields, monkeypatch):
    config = eigen(bank_dir, task_type="CAUSAL_LM", save_basis=True, **fields)
    model = perturb(get_peft_model(llama(), config)).eval()
    model.save_pretrained(tmp_path / "task")
    monkeypatch.chdir(tmp_path)  # where no bank is
    loaded = load(llama(), tmp_path / "task")
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs), rtol=0, atol=0)


# --- as a LoRA --------------------------------------------------------------------------------------------------------


def test_the_exported_lora_is_the_model(model, inputs, tmp_path):
    export_lora(model).save(tmp_path / "lora")
    stock = PeftModel.from_pretrained(llama(), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(stock, inputs), logits(model, inputs), rtol=1e-5, atol=1e-5)
    assert LoraAdapter.load(tmp_path / "lora").task_type == "CAUSAL_LM"


@pytest.mark.parametrize("make", [bert, gpt2, t5])
def test_other_architectures_are_exported_too(make, bank_dirs, inputs, tmp_path, fields):
    options = {"labels": torch.tensor([0, 1, 2, 0]) if make is bert else inputs["input_ids"]}
    kind = {"bert": "SEQ_CLS", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}[make.__name__]
    model = perturb(get_peft_model(make(), eigen(bank_dirs[make.__name__], task_type=kind, **fields))).eval()
    export_lora(model).save(tmp_path / "lora")
    stock = PeftModel.from_pretrained(make(), tmp_path / "lora").eval()
    ours, theirs = logits(model, inputs, **options), logits(stock, inputs, **options)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_peft_converts_it_to_lora_itself(model, inputs, tmp_path, fields):
    from peft import save_as_lora

    assert model.supports_lora_conversion()
    rank = max(len(layer.factors("default")[0]) for layer in adapter_layers(model))
    save_as_lora(tmp_path / "lora", model, rank=rank)
    stock = PeftModel.from_pretrained(llama(), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(stock, inputs), logits(model, inputs), rtol=1e-4, atol=1e-4)


# --- several adapters -------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(model, bank_dir, fields):
    """The model with a second adapter of the same kind."""
    model.add_adapter("second", eigen(bank_dir, task_type="CAUSAL_LM", **fields))
    perturb(model, "second", seed=5)
    return model.eval()


def test_adapters_of_one_bank_share_the_basis(pair, fields):
    for layer in adapter_layers(pair):
        assert len(layer.shared_V) == len(layer.shared_U) == 1
        assert layer.basis_of["default"].id == layer.basis_of["second"].id


def test_a_basis_goes_with_the_last_adapter_that_needs_it(pair):
    for layer in adapter_layers(pair):
        layer.delete_adapter("second")
        assert len(layer.shared_V) == 1
        layer.delete_adapter("default")
        assert len(layer.shared_V) == len(layer.shared_U) == 0


def test_a_mixed_batch_is_the_rows_one_by_one(pair, inputs):
    names = ["default", "second", "__base__", "default"]
    mixed = logits(pair, inputs, adapter_names=names)
    expected = logits(pair, inputs)
    pair.set_adapter("second")
    second = logits(pair, inputs)
    expected[1] = second[1]
    expected[2] = logits(llama(), inputs)[2]
    torch.testing.assert_close(mixed, expected, **CLOSE)


def test_a_mixed_batch_refuses_strangers_and_training(pair, inputs):
    with pytest.raises(ValueError, match="nobody"):
        pair(**inputs, adapter_names=["nobody"] * 4)
    with pytest.raises(ValueError, match="rows"):
        pair(**inputs, adapter_names=["default"])
    pair.train()
    with pytest.raises(ValueError, match=r"eval\(\)"):
        pair(**inputs, adapter_names=["default"] * 4)


def test_generation_mixes_too(pair, inputs):
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    names = ["default", "second", "__base__", "second"]
    mixed = pair.generate(**inputs, adapter_names=names, **options)
    alone = pair.generate(**inputs, **options)
    pair.set_adapter("second")
    second = pair.generate(**inputs, **options)
    assert torch.equal(mixed[0], alone[0])
    assert torch.equal(mixed[1], second[1])
    assert torch.equal(mixed[3], second[3])
    beams = pair.generate(**inputs, adapter_names=["second"] * 4, num_beams=2, **options)
    assert torch.equal(beams, pair.generate(**inputs, num_beams=2, **options))


def test_an_adapter_that_can_not_be_added_leaves_nothing(model, bank_dir, inputs, fields, tmp_path):
    expected = logits(model, inputs)
    wrong = {**fields, "start": "member:nobody"}
    with pytest.raises(UnknownNameError, match="nobody"):
        model.add_adapter("second", eigen(bank_dir, task_type="CAUSAL_LM", **wrong))
    with pytest.raises(AdapterBankError, match="r=30 is more"):
        model.add_adapter("second", eigen(bank_dir, r=30, task_type="CAUSAL_LM", **{**fields, "train": "coefficients"}))
    assert not any("second" in layer.r for layer in adapter_layers(model))
    torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=0)
    plain = llama()
    with pytest.raises(UnknownNameError, match="nobody"):
        get_peft_model(plain, eigen(bank_dir, **wrong))
    assert not adapter_layers(plain)
    model.add_adapter("second", eigen(bank_dir, target_modules=["q_proj"], task_type="CAUSAL_LM", **fields))
    model.set_adapter("second")
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    load(llama(), tmp_path / "second", bank=bank_dir)


# --- dtypes -----------------------------------------------------------------------------------------------------------


def test_the_basis_moves_with_the_model(model):
    double = model.to(torch.float64)
    assert all(b.dtype == torch.float64 for layer in adapter_layers(double) for b in layer.shared_V.values())


def test_without_autocast_the_weights_take_the_type_of_the_base(bank_dir, inputs, fields):
    config = eigen(bank_dir, task_type="CAUSAL_LM", **fields)
    model = get_peft_model(llama().to(torch.bfloat16), config, autocast_adapter_dtype=False)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters() if p.requires_grad)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
