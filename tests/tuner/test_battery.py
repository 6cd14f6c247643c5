"""Every behaviour that users of PEFT expect of a method, for every way to train in a bank: one table, one battery."""

import copy
import json
import pickle
import warnings

import jaxtyping
import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file

from adapterbank.adapters import LoraAdapter
from adapterbank.errors import AdapterBankError, UnknownNameError
from adapterbank.tuner import export_lora, load, optimizer_groups
from adapterbank.tuner.layer import EigenLoraLayer
from tiny_models import ROWS, bert, eigen, gpt2, llama, perturb, t5

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


def layers(model):
    return [m for m in model.modules() if isinstance(m, EigenLoraLayer)]


# --- training ---------------------------------------------------------------------------------------------------------


def test_an_untrained_adapter_is_the_base_model(bank_dir, inputs, fields):
    model = get_peft_model(llama(), eigen(bank_dir, **fields)).eval()
    if fields.get("start") == "random":
        assert not torch.allclose(logits(model, inputs), logits(llama(), inputs))
    else:
        assert torch.equal(logits(model, inputs), logits(llama(), inputs))


def test_only_the_adapter_is_trained(model):
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".eig_" in name for name in trained)
    assert all(p.is_floating_point() for p in model.parameters() if p.requires_grad)


def test_every_weight_gets_a_gradient_and_the_basis_none(model, inputs):
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    assert not any(b.requires_grad for b in model.buffers())


def test_training_lowers_the_loss_and_leaves_the_rest_alone(model, inputs):
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    frozen |= {n: b.clone() for n, b in model.named_buffers()}
    optimizer = torch.optim.AdamW(optimizer_groups(model))
    losses = []
    for _ in range(8):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    now = dict(model.named_parameters()) | dict(model.named_buffers())
    assert all(torch.equal(value, now[name]) for name, value in frozen.items())


def test_a_step_through_the_layers_is_one_on_the_explicit_factors(model):
    # the same gradient as autograd finds for dW, by the chain rule through A' and B'
    layer = layers(model)[0]
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
    layer = layers(model)[0]
    layer.eval()
    x = torch.randn(64, layer.in_features)
    with torch.no_grad():
        one_by_one = torch.cat([layer(row[None]) for row in x])
        torch.testing.assert_close(layer(x), one_by_one, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients(model, inputs):
    def gradients():
        model.train()
        torch.manual_seed(3)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        found = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        model.zero_grad()
        return found

    before = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for ours, theirs in zip(gradients(), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


# --- saving and loading -----------------------------------------------------------------------------------------------


def test_a_saved_adapter_comes_back(model, inputs, tmp_path, bank_dir):
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path / "task")
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "task", bank=bank_dir).eval()
    torch.testing.assert_close(logits(loaded, inputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize("lean", [False, True])
def test_loading_needs_no_memory_twice(model, inputs, tmp_path, lean, bank_dir):
    model.save_pretrained(tmp_path / "task")
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "task", bank=bank_dir, low_cpu_mem_usage=lean).eval()
    assert all(p.device.type == "cpu" for p in loaded.parameters())
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs), rtol=0, atol=0)


def test_our_loader_gives_the_same(model, inputs, tmp_path, bank_dir):
    model.save_pretrained(tmp_path / "task")
    loaded = load(llama(), tmp_path / "task", bank=bank_dir)
    assert not any(p.requires_grad for p in loaded.parameters())
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs), rtol=0, atol=0)


def test_loading_to_train_on_gives_gradients(model, tmp_path, bank_dir):
    model.save_pretrained(tmp_path / "task")
    loaded = load(llama(), tmp_path / "task", bank=bank_dir, is_trainable=True)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_the_file_holds_the_adapter_and_nothing_else(model, tmp_path):
    model.save_pretrained(tmp_path / "task")
    tensors = load_file(tmp_path / "task" / "adapter_model.safetensors")
    assert all(".eig_" in name for name in tensors)
    saved = sum(t.numel() for t in tensors.values() if t.is_floating_point())
    assert saved == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_config_names_no_path(model, tmp_path, bank_dir):
    model.save_pretrained(tmp_path / "task")
    text = (tmp_path / "task" / "adapter_config.json").read_text()
    assert json.loads(text)["bank"] == bank_dir.name
    assert str(bank_dir.parent) not in text


def test_auto_classes_load_it(model, inputs, tmp_path, monkeypatch, bank_dir):
    llama().save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "task")
    monkeypatch.setenv("ADAPTERBANK_BANK", str(bank_dir))
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "task").eval()
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs), **CLOSE)


def test_a_state_dict_goes_into_a_fresh_adapter(model, inputs, bank_dir, fields):
    state = get_peft_model_state_dict(model)
    other = get_peft_model(llama(), eigen(bank_dir, task_type="CAUSAL_LM", **fields)).eval()
    result = set_peft_model_state_dict(other, state)
    assert not result.unexpected_keys
    torch.testing.assert_close(logits(other, inputs), logits(model, inputs), rtol=0, atol=0)


def test_it_brings_its_basis_along_if_told_to(bank_dir, inputs, tmp_path, fields, monkeypatch):
    config = eigen(bank_dir, task_type="CAUSAL_LM", save_basis=True, **fields)
    model = perturb(get_peft_model(llama(), config)).eval()
    model.save_pretrained(tmp_path / "task")
    monkeypatch.chdir(tmp_path)  # where no bank is
    loaded = load(llama(), tmp_path / "task")
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs), rtol=0, atol=0)


def test_a_copy_of_the_model_is_its_own(model, inputs):
    expected = logits(model, inputs)
    other = copy.deepcopy(model)
    perturb(other, seed=9)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=0)
    assert not torch.allclose(logits(other, inputs), expected)


def test_configs_survive_pickling_and_copying(model):
    config = model.peft_config["default"]
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()
    assert copy.deepcopy(config).to_dict() == config.to_dict()


# --- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [False, True])
def test_merging_changes_no_output_and_unmerging_restores(model, inputs, safe):
    expected, weight = logits(model, inputs), layers(model)[0].base_layer.weight.clone()
    model.merge_adapter(safe_merge=safe)
    assert not torch.equal(layers(model)[0].base_layer.weight, weight)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(layers(model)[0].base_layer.weight, weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)


def test_merge_and_unload_leaves_a_plain_model(model, inputs):
    expected = logits(model, inputs)
    plain = model.merge_and_unload()
    assert not any(isinstance(m, EigenLoraLayer) for m in plain.modules())
    torch.testing.assert_close(logits(plain, inputs), expected, rtol=1e-4, atol=1e-5)


def test_unloading_gives_the_base_model(model, inputs):
    assert torch.equal(logits(model.unload(), inputs), logits(llama(), inputs))


def test_safe_merging_refuses_values_that_are_not_finite(model):
    layer = layers(model)[0]
    weight = layer.base_layer.weight.clone()
    next(p for p in layer.weights("default").values() if p.is_floating_point()).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, weight)


def test_disabling_gives_the_base_model_also_when_merged(model, inputs):
    expected = logits(model, inputs)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), logits(llama(), inputs))
    torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=0)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, inputs), logits(llama(), inputs), rtol=1e-4, atol=1e-5)


# --- as a LoRA --------------------------------------------------------------------------------------------------------


def test_the_exported_lora_is_the_model(model, inputs, tmp_path):
    export_lora(model).save(tmp_path / "lora")
    stock = PeftModel.from_pretrained(llama(), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(stock, inputs), logits(model, inputs), rtol=1e-5, atol=1e-5)
    assert LoraAdapter.load(tmp_path / "lora").task_type == "CAUSAL_LM"


def test_peft_converts_it_to_lora_itself(model, inputs, tmp_path, fields):
    from peft import save_as_lora

    assert model.supports_lora_conversion()
    rank = max(len(layer.factors("default")[0]) for layer in layers(model))
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


def test_adding_an_adapter_changes_nothing(model, inputs, bank_dir, fields):
    expected, trained = logits(model, inputs), {n for n, p in model.named_parameters() if p.requires_grad}
    model.add_adapter("second", eigen(bank_dir, task_type="CAUSAL_LM", **fields))
    model.eval()
    torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=0)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    assert model.active_adapter == "default"


def test_adapters_of_one_bank_share_the_basis(pair, fields):
    for layer in layers(pair):
        assert len(layer.shared_V) == len(layer.shared_U) == 1
        assert layer.basis_of["default"].id == layer.basis_of["second"].id


def test_switching_goes_back_and_forth(pair, inputs):
    first = logits(pair, inputs)
    pair.set_adapter("second")
    second = logits(pair, inputs)
    assert not torch.allclose(first, second)
    trained = {n for n, p in pair.named_parameters() if p.requires_grad}
    assert trained
    assert all(n.endswith(".second") for n in trained)
    pair.set_adapter("default")
    torch.testing.assert_close(logits(pair, inputs), first, rtol=0, atol=0)
    pair.set_adapter("default", inference_mode=True)
    assert not any(p.requires_grad for p in pair.parameters())


def test_both_at_once_add_up(pair):
    layer = layers(pair)[0]
    x = torch.randn(30, layer.in_features)
    with torch.no_grad():
        base = layer.base_layer(x)
        one = layer(x) - base
        layer.set_adapter("second")
        other = layer(x) - base
        layer.set_adapter(["default", "second"])
        torch.testing.assert_close(layer(x) - base, one + other, **CLOSE)


def test_each_is_saved_and_loaded_alone(pair, inputs, tmp_path, bank_dir):
    first = logits(pair, inputs)
    pair.set_adapter("second")
    second = logits(pair, inputs)
    pair.save_pretrained(tmp_path)
    loaded = load(llama(), tmp_path, bank=bank_dir)
    load(loaded, tmp_path / "second", bank=bank_dir, adapter_name="other")
    loaded.eval()
    torch.testing.assert_close(logits(loaded, inputs), first, rtol=0, atol=0)
    loaded.set_adapter("other")
    torch.testing.assert_close(logits(loaded, inputs), second, rtol=0, atol=0)


def test_names_inside_names_are_told_apart(model, inputs, bank_dir, fields, tmp_path):
    expected = logits(model, inputs)
    model.add_adapter("defaul", eigen(bank_dir, task_type="CAUSAL_LM", **fields))
    perturb(model, "defaul", seed=7)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load(llama(), tmp_path, bank=bank_dir), inputs), expected, rtol=0, atol=0)


def test_deleting_leaves_the_other(pair, inputs):
    pair.set_adapter("second")
    second = logits(pair, inputs)
    pair.delete_adapter("default")
    torch.testing.assert_close(logits(pair, inputs), second, rtol=0, atol=0)
    assert "default" not in pair.peft_config
    assert not [n for n, _ in pair.named_parameters() if n.endswith(".default")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pair.delete_adapter("second")
    assert all(len(layer.shared_V) == 0 for layer in layers(pair))
    # PEFT's own wrapper still asks for the last adapter, of any method
    assert torch.equal(logits(pair.base_model.model, inputs), logits(llama(), inputs))


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


def test_requires_grad_is_set_for_adapters_that_are_not_active(pair):
    pair.set_requires_grad("second", True)
    assert any(n.endswith(".second") and p.requires_grad for n, p in pair.named_parameters())
    pair.set_requires_grad(["default", "second"], False)
    assert not any(p.requires_grad for p in pair.parameters())


def test_status_is_what_peft_expects(pair):
    status = get_model_status(pair)
    assert status.available_adapters == ["default", "second"]
    assert status.active_adapters == ["default"]
    assert status.enabled is True
    assert status.merged_adapters == []


def test_scaling_an_adapter_scales_its_update(model):
    layer = layers(model)[0]
    delta = layer.get_delta_weight("default").clone()
    layer.set_scale("default", 2.0)
    torch.testing.assert_close(layer.get_delta_weight("default"), 2 * delta)
    layer.scale_layer(0.5)
    torch.testing.assert_close(layer.get_delta_weight("default"), delta)
    layer.scale_layer(3.0)
    layer.unscale_layer()
    torch.testing.assert_close(layer.get_delta_weight("default"), delta)


def names_of_trained(model):
    return {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad and ".eig_" in n}


def test_only_the_active_adapter_is_trained_however_the_others_came(model, bank_dir, fields, tmp_path):
    model.save_pretrained(tmp_path)
    load(model, tmp_path, bank=bank_dir, adapter_name="second")
    model.add_adapter("third", eigen(bank_dir, target_modules=["q_proj"], inference_mode=True, **fields))
    assert names_of_trained(model) == {"default"}
    for name in ("second", "third", "default"):
        model.set_adapter(name)
        assert names_of_trained(model) == {name}
    for layer in layers(model):
        layer.requires_grad_(False)
    model.set_adapter("second")
    assert names_of_trained(model) == {"second"}


def test_an_adapter_that_can_not_be_added_leaves_nothing(model, bank_dir, inputs, fields, tmp_path):
    expected = logits(model, inputs)
    wrong = {**fields, "start": "member:nobody"}
    with pytest.raises(UnknownNameError, match="nobody"):
        model.add_adapter("second", eigen(bank_dir, task_type="CAUSAL_LM", **wrong))
    with pytest.raises(AdapterBankError, match="r=30 is more"):
        model.add_adapter("second", eigen(bank_dir, r=30, task_type="CAUSAL_LM", **{**fields, "train": "coefficients"}))
    assert not any("second" in layer.r for layer in layers(model))
    torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=0)
    plain = llama()
    with pytest.raises(UnknownNameError, match="nobody"):
        get_peft_model(plain, eigen(bank_dir, **wrong))
    assert not layers(plain)
    model.add_adapter("second", eigen(bank_dir, target_modules=["q_proj"], task_type="CAUSAL_LM", **fields))
    model.set_adapter("second")
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    load(llama(), tmp_path / "second", bank=bank_dir)


def test_adding_an_adapter_leaves_a_frozen_head_frozen(bank_dirs, fields):
    model = get_peft_model(bert(), eigen(bank_dirs["bert"], task_type="SEQ_CLS", **fields))
    model.set_adapter("default", inference_mode=True)
    for name in ("second", "third"):
        model.add_adapter(name, eigen(bank_dirs["bert"], task_type="SEQ_CLS", **fields))
    assert not any(p.requires_grad for p in model.parameters())


# --- dtypes, compilers, other doors -----------------------------------------------------------------------------------


def test_a_bf16_base_keeps_float32_coefficients(bank_dir, inputs, fields):
    model = get_peft_model(llama().to(torch.bfloat16), eigen(bank_dir, task_type="CAUSAL_LM", **fields))
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    out = model(**inputs, labels=inputs["input_ids"])
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_without_autocast_the_weights_take_the_type_of_the_base(bank_dir, inputs, fields):
    config = eigen(bank_dir, task_type="CAUSAL_LM", **fields)
    model = get_peft_model(llama().to(torch.bfloat16), config, autocast_adapter_dtype=False)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters() if p.requires_grad)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()


def test_the_whole_model_moves_to_another_dtype(model, inputs):
    expected = logits(model, inputs)
    double = model.to(torch.float64)
    torch.testing.assert_close(logits(double, inputs).float(), expected, rtol=1e-3, atol=1e-4)
    assert all(b.dtype == torch.float64 for layer in layers(double) for b in layer.shared_V.values())


def test_it_compiles_as_one_graph(model, monkeypatch):
    # the checks of shapes, which only tests have, are no part of the graph
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    layer = layers(model)[0].eval()
    x = torch.randn(3, 16, layer.in_features)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x), **CLOSE)
    torch.testing.assert_close(compiled(x[:1, :1]), layer(x[:1, :1]), **CLOSE)


def test_transformers_takes_it_natively(bank_dir, inputs, tmp_path, fields, monkeypatch):
    monkeypatch.setenv("ADAPTERBANK_BANK", str(bank_dir))
    model = llama()
    model.add_adapter(eigen(bank_dir, **fields))
    perturb(model)
    model.eval()
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path / "task")
    other = llama()
    other.load_adapter(str(tmp_path / "task"), adapter_name="again")
    other.eval()
    torch.testing.assert_close(logits(other, inputs), expected, rtol=0, atol=0)
    other.disable_adapters()
    assert torch.equal(logits(other, inputs), logits(llama(), inputs))
    other.enable_adapters()
    torch.testing.assert_close(logits(other, inputs), expected, rtol=0, atol=0)


def test_layers_are_injected_without_a_wrapper(bank_dir, inputs, fields):
    model = inject_adapter_in_model(eigen(bank_dir, **fields), llama())
    perturb(model)
    assert layers(model)
    assert logits(model.eval(), inputs).isfinite().all()


def test_layers_can_be_chosen(bank_dir, fields):
    model = get_peft_model(llama(), eigen(bank_dir, target_modules=["q_proj"], **fields))
    assert {n.rpartition(".")[2] for n in model.targeted_module_names} == {"q_proj"}
    model = get_peft_model(llama(), eigen(bank_dir, exclude_modules=r".*\.0\..*", **fields))
    assert not [n for n in model.targeted_module_names if ".0." in n]
    assert len(model.targeted_module_names) == 4
    for chosen in ({}, {"target_modules": ["q_proj", "v_proj"]}):
        model = get_peft_model(llama(), eigen(bank_dir, layers_to_transform=[1], **chosen, **fields))
        assert {n.split(".")[2] for n in model.targeted_module_names} == {"1"}


@pytest.mark.parametrize("make", [bert, gpt2, t5])
def test_other_architectures_train_merge_and_come_back(make, bank_dirs, inputs, tmp_path, fields):
    bank = bank_dirs[make.__name__]
    kind = {"bert": "SEQ_CLS", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}[make.__name__]
    labels = torch.tensor([0, 1, 2, 0]) if make is bert else inputs["input_ids"]
    model = get_peft_model(make(), eigen(bank, task_type=kind, **fields))
    model(**inputs, labels=labels).loss.backward()
    perturb(model).eval()
    expected = logits(model, inputs, labels=labels)
    model.save_pretrained(tmp_path / "task")
    loaded = load(make(), tmp_path / "task", bank=bank)
    torch.testing.assert_close(logits(loaded, inputs, labels=labels), expected, rtol=0, atol=0)
    loaded.merge_adapter()
    torch.testing.assert_close(logits(loaded, inputs, labels=labels), expected, rtol=1e-4, atol=1e-5)
    loaded.unmerge_adapter()
    export_lora(loaded).save(tmp_path / "lora")
    stock = PeftModel.from_pretrained(make(), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(stock, inputs, labels=labels), expected, rtol=1e-4, atol=1e-5)


def test_a_head_is_trained_and_saved_whole(bank_dirs, inputs, tmp_path, fields):
    model = get_peft_model(bert(), eigen(bank_dirs["bert"], task_type="SEQ_CLS", **fields))
    head = model.base_model.model.classifier.modules_to_save["default"]
    assert head.weight.requires_grad
    head.weight.data += 1
    model.save_pretrained(tmp_path / "task")
    loaded = load(bert(), tmp_path / "task", bank=bank_dirs["bert"])
    assert torch.equal(loaded.base_model.model.classifier.modules_to_save["default"].weight, head.weight)
    torch.testing.assert_close(logits(loaded, inputs), logits(model.eval(), inputs), rtol=0, atol=0)


def test_the_config_file_is_read_by_peft(model, tmp_path):
    model.save_pretrained(tmp_path / "task")
    config = PeftConfig.from_pretrained(tmp_path / "task")
    assert config.peft_type.value == "EIGENLORAX"
    assert config.to_dict() == {**model.peft_config["default"].to_dict(), "inference_mode": True}
