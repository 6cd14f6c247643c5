"""Every behaviour that users of PEFT expect of a method, for every way to train: one table, one battery.

Rows are ``METHODS`` in ``tiny_models.py``. What only one method has is tested beside it.
"""

import copy
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

from adapterbank.errors import AdapterBankError
from tiny_models import METHODS, adapter_layers, bert, gpt2, llama, perturb, t5, weights_of

CLOSE = {"rtol": 1e-5, "atol": 2e-6}
EXACT = {"rtol": 0, "atol": 0}


@pytest.fixture(params=METHODS)
def config(request, bank_dirs, monkeypatch):
    """A config for a kind of model; what is loaded afterwards is for this kind too."""

    def make(kind="llama", **fields):
        monkeypatch.setenv("ADAPTERBANK_BANK", str(bank_dirs[kind]))
        return METHODS[request.param](bank_dirs[kind], **{"task_type": "CAUSAL_LM", **fields})

    return make


@pytest.fixture
def model(config):
    """A causal model with an adapter as if trained."""
    return perturb(get_peft_model(llama(), config())).eval()


@pytest.fixture
def pair(model, config):
    """The model with a second adapter of the same kind."""
    model.add_adapter("second", config())
    return perturb(model, "second", seed=5).eval()


def logits(model, inputs, **kwargs):
    with torch.no_grad():
        return model(**inputs, **kwargs).logits


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def of(model, adapter_name):
    """Names of an adapter's parameters."""
    mine = {id(p) for layer in adapter_layers(model) for p in weights_of(layer, adapter_name)}
    return {name for name, p in model.named_parameters() if id(p) in mine and p.is_floating_point()}


# --- training ---------------------------------------------------------------------------------------------------------


def test_an_untrained_adapter_is_the_base_model(config, inputs):
    made = config()
    model = get_peft_model(llama(), made).eval()
    assert torch.equal(logits(model, inputs), logits(llama(), inputs)) == (getattr(made, "start", "") != "random")


def test_only_the_adapter_is_trained_and_all_of_it_gets_a_gradient(model, inputs):
    assert trained(model) and trained(model) <= of(model, "default")
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    assert not any(b.requires_grad for b in model.buffers())


def test_training_lowers_the_loss_and_leaves_the_rest_alone(model, inputs):
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    frozen |= {n: b.clone() for n, b in model.named_buffers()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
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


@pytest.mark.parametrize("lean", [False, True])
def test_a_saved_adapter_comes_back(model, inputs, tmp_path, lean):
    model.save_pretrained(tmp_path / "task")
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "task", low_cpu_mem_usage=lean).eval()
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs), **EXACT)
    assert not trained(loaded) and all(p.device.type == "cpu" for p in loaded.parameters())


def test_loading_to_train_on_gives_gradients(model, inputs, tmp_path):
    model.save_pretrained(tmp_path / "task")
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "task", is_trainable=True)
    assert trained(loaded) == trained(model)
    loaded(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad.any() for p in loaded.parameters() if p.requires_grad)


def test_the_file_holds_the_adapter_and_nothing_else(model, tmp_path):
    model.save_pretrained(tmp_path / "task")
    tensors = load_file(tmp_path / "task" / "adapter_model.safetensors")
    saved = sum(t.numel() for t in tensors.values() if t.is_floating_point())
    assert saved == sum(p.numel() for n, p in model.named_parameters() if n in of(model, "default"))


def test_auto_classes_load_it(model, inputs, tmp_path):
    llama().save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "task")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "task").eval()
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs), **CLOSE)


def test_a_state_dict_goes_into_a_fresh_adapter(model, config, inputs):
    other = get_peft_model(llama(), config()).eval()
    assert not set_peft_model_state_dict(other, get_peft_model_state_dict(model)).unexpected_keys
    torch.testing.assert_close(logits(other, inputs), logits(model, inputs), **EXACT)


def test_a_copy_of_the_model_is_its_own(model, inputs):
    expected = logits(model, inputs)
    other = perturb(copy.deepcopy(model), seed=9)
    torch.testing.assert_close(logits(model, inputs), expected, **EXACT)
    assert not torch.allclose(logits(other, inputs), expected)


def test_configs_survive_files_pickling_and_copying(model, tmp_path):
    config = model.peft_config["default"]
    model.save_pretrained(tmp_path / "task")
    assert str(tmp_path) not in (tmp_path / "task" / "adapter_config.json").read_text()
    found = PeftConfig.from_pretrained(tmp_path / "task")
    assert type(found) is type(config)
    assert found.to_dict() == {**config.to_dict(), "inference_mode": True}
    for again in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert again.to_dict() == config.to_dict()


# --- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [False, True])
def test_merging_changes_no_output_and_unmerging_restores(model, inputs, safe):
    expected, weight = logits(model, inputs), adapter_layers(model)[0].base_layer.weight.clone()
    model.merge_adapter(safe_merge=safe)
    assert not torch.equal(adapter_layers(model)[0].base_layer.weight, weight)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(adapter_layers(model)[0].base_layer.weight, weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)


def test_merge_and_unload_leaves_a_plain_model(model, inputs):
    expected = logits(model, inputs)
    plain = model.merge_and_unload()
    assert not adapter_layers(plain)
    torch.testing.assert_close(logits(plain, inputs), expected, rtol=1e-4, atol=1e-5)


def test_unloading_gives_the_base_model(model, inputs):
    assert torch.equal(logits(model.unload(), inputs), logits(llama(), inputs))


def test_safe_merging_refuses_values_that_are_not_finite(model):
    layer = adapter_layers(model)[0]
    weight = layer.base_layer.weight.clone()
    next(p for p in weights_of(layer) if p.is_floating_point()).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, weight)


def test_disabling_gives_the_base_model_also_when_merged(model, inputs):
    expected = logits(model, inputs)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), logits(llama(), inputs))
    torch.testing.assert_close(logits(model, inputs), expected, **EXACT)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, inputs), logits(llama(), inputs), rtol=1e-4, atol=1e-5)


# --- several adapters -------------------------------------------------------------------------------------------------


def test_adding_an_adapter_changes_nothing(model, config, inputs):
    expected, before = logits(model, inputs), trained(model)
    model.add_adapter("second", config())
    torch.testing.assert_close(logits(model.eval(), inputs), expected, **EXACT)
    assert trained(model) == before
    assert model.active_adapter == "default"


def test_switching_goes_back_and_forth(pair, inputs):
    first = logits(pair, inputs)
    pair.set_adapter("second")
    assert not torch.allclose(first, logits(pair, inputs))
    assert trained(pair) and trained(pair) <= of(pair, "second")
    pair.set_adapter("default")
    torch.testing.assert_close(logits(pair, inputs), first, **EXACT)
    pair.set_adapter("default", inference_mode=True)
    assert not trained(pair)


def test_both_at_once_add_up(pair):
    layer = adapter_layers(pair)[0]
    x = torch.randn(30, layer.in_features)
    with torch.no_grad():
        base = layer.base_layer(x)
        one = layer(x) - base
        layer.set_adapter("second")
        other = layer(x) - base
        layer.set_adapter(["default", "second"])
        torch.testing.assert_close(layer(x) - base, one + other, rtol=1e-5, atol=1e-5)


def test_each_is_saved_and_loaded_alone(pair, inputs, tmp_path):
    first = logits(pair, inputs)
    pair.set_adapter("second")
    second = logits(pair, inputs)
    pair.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    loaded.load_adapter(tmp_path / "second", "other")
    torch.testing.assert_close(logits(loaded.eval(), inputs), first, **EXACT)
    loaded.set_adapter("other")
    torch.testing.assert_close(logits(loaded, inputs), second, **EXACT)


def test_names_inside_names_are_told_apart(model, config, inputs, tmp_path):
    expected = logits(model, inputs)
    model.add_adapter("defaul", config())
    perturb(model, "defaul", seed=7)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded, inputs), expected, **EXACT)


def test_deleting_leaves_the_other(pair, inputs):
    pair.set_adapter("second")
    second = logits(pair, inputs)
    pair.delete_adapter("default")
    torch.testing.assert_close(logits(pair, inputs), second, **EXACT)
    assert "default" not in pair.peft_config
    assert not any(weights_of(layer, "default") for layer in adapter_layers(pair))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pair.delete_adapter("second")
    # PEFT's own wrapper still asks for the last adapter, of any method
    assert torch.equal(logits(pair.base_model.model, inputs), logits(llama(), inputs))


def test_requires_grad_is_set_for_adapters_that_are_not_active(pair):
    before = trained(pair)
    pair.set_requires_grad("second", True)
    assert trained(pair) > before and trained(pair) - before <= of(pair, "second")
    pair.set_requires_grad(["default", "second"], False)
    assert not trained(pair)


def test_only_the_active_adapter_is_trained_however_the_others_came(model, config, tmp_path):
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "second")
    model.add_adapter("third", config(target_modules=["q_proj"], inference_mode=True))
    assert trained(model) <= of(model, "default")
    for name in ("second", "third", "default"):
        model.set_adapter(name)
        assert trained(model) and trained(model) <= of(model, name)


def test_status_is_what_peft_expects(pair):
    status = get_model_status(pair)
    assert status.available_adapters == ["default", "second"]
    assert status.active_adapters == ["default"]
    assert status.enabled is True
    assert status.merged_adapters == []


def test_scaling_an_adapter_scales_its_update(model):
    layer = adapter_layers(model)[0]
    delta = layer.get_delta_weight("default").clone()
    layer.set_scale("default", 2.0)
    torch.testing.assert_close(layer.get_delta_weight("default"), 2 * delta)
    layer.scale_layer(0.5)
    torch.testing.assert_close(layer.get_delta_weight("default"), delta)
    layer.scale_layer(3.0)
    layer.unscale_layer()
    torch.testing.assert_close(layer.get_delta_weight("default"), delta)


# --- dtypes, compilers, other doors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_base_in_16_bits_trains_in_float32(config, inputs, dtype):
    model = get_peft_model(llama().to(dtype), config())
    out = model(**inputs, labels=inputs["input_ids"])
    assert out.logits.dtype == dtype
    out.loss.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    found = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in found)


def test_the_whole_model_moves_to_another_dtype(model, inputs):
    expected = logits(model, inputs)
    double = model.to(torch.float64)
    torch.testing.assert_close(logits(double, inputs).float(), expected, rtol=1e-3, atol=1e-4)


def test_it_compiles_as_one_graph(model, monkeypatch):
    # the checks of shapes, which only tests have, are no part of the graph
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    layer = adapter_layers(model)[0].eval()
    x, weights = torch.randn(3, 16, layer.in_features, requires_grad=True), weights_of(layer)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x), **CLOSE)
    few = x[:1, :1].detach()
    torch.testing.assert_close(compiled(few), layer(few), **CLOSE)
    wanted = [x, *(weight for weight in weights if weight.requires_grad)]
    ours, theirs = (torch.autograd.grad(f(x).square().sum(), wanted) for f in (compiled, layer))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_transformers_takes_it_natively(config, inputs, tmp_path):
    model = llama()
    model.add_adapter(config())
    expected = logits(perturb(model).eval(), inputs)
    model.save_pretrained(tmp_path / "task")
    other = llama()
    other.load_adapter(str(tmp_path / "task"), adapter_name="again")
    torch.testing.assert_close(logits(other.eval(), inputs), expected, **EXACT)
    other.disable_adapters()
    assert torch.equal(logits(other, inputs), logits(llama(), inputs))
    other.enable_adapters()
    torch.testing.assert_close(logits(other, inputs), expected, **EXACT)


def test_layers_are_injected_without_a_wrapper(config, inputs):
    model = perturb(inject_adapter_in_model(config(), llama())).eval()
    assert adapter_layers(model)
    assert logits(model, inputs).isfinite().all()


def test_layers_can_be_chosen(config):
    model = get_peft_model(llama(), config(target_modules=["q_proj"]))
    assert {n.rpartition(".")[2] for n in model.targeted_module_names} == {"q_proj"}
    model = get_peft_model(llama(), config(exclude_modules=r".*\.0\..*"))
    assert len(model.targeted_module_names) == 4 and not [n for n in model.targeted_module_names if ".0." in n]
    for chosen in ({}, {"target_modules": ["q_proj", "v_proj"]}):
        model = get_peft_model(llama(), config(layers_to_transform=[1], **chosen))
        assert {n.split(".")[2] for n in model.targeted_module_names} == {"1"}


@pytest.mark.parametrize("make", [bert, gpt2, t5])
def test_other_architectures_train_merge_and_come_back(make, config, inputs, tmp_path):
    kind = {"bert": "SEQ_CLS", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}[make.__name__]
    labels = torch.tensor([0, 1, 2, 0]) if make is bert else inputs["input_ids"]
    model = get_peft_model(make(), config(make.__name__, task_type=kind))
    model(**inputs, labels=labels).loss.backward()
    perturb(model).eval()
    expected = logits(model, inputs, labels=labels)
    model.save_pretrained(tmp_path / "task")
    loaded = PeftModel.from_pretrained(make(), tmp_path / "task").eval()
    torch.testing.assert_close(logits(loaded, inputs, labels=labels), expected, **EXACT)
    loaded.merge_adapter()
    torch.testing.assert_close(logits(loaded, inputs, labels=labels), expected, rtol=1e-4, atol=1e-5)


def test_a_head_is_trained_and_saved_whole(config, inputs, tmp_path):
    model = get_peft_model(bert(), config("bert", task_type="SEQ_CLS"))
    head = model.base_model.model.classifier.modules_to_save["default"]
    assert head.weight.requires_grad
    head.weight.data += 1
    model.save_pretrained(tmp_path / "task")
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "task").eval()
    assert torch.equal(loaded.base_model.model.classifier.modules_to_save["default"].weight, head.weight)
    torch.testing.assert_close(logits(loaded, inputs), logits(model.eval(), inputs), **EXACT)


def test_adding_an_adapter_leaves_a_frozen_head_frozen(config):
    model = get_peft_model(bert(), config("bert", task_type="SEQ_CLS"))
    model.set_adapter("default", inference_mode=True)
    for name in ("second", "third"):
        model.add_adapter(name, config("bert", task_type="SEQ_CLS"))
    assert not trained(model)


def test_an_adapter_that_can_not_be_put_in_leaves_nothing(model, config, inputs, tmp_path):
    expected = logits(model, inputs)
    with pytest.raises(AdapterBankError):
        model.add_adapter("second", config(target_modules=["q_proj", "embed_tokens"]))
    assert not any(weights_of(layer, "second") for layer in adapter_layers(model))
    torch.testing.assert_close(logits(model, inputs), expected, **EXACT)
    plain = llama()
    with pytest.raises(AdapterBankError):
        get_peft_model(plain, config(target_modules=["q_proj", "embed_tokens"]))
    assert not adapter_layers(plain)
    model.add_adapter("second", config(target_modules=["q_proj"]))
    perturb(model, "second").save_pretrained(tmp_path, selected_adapters=["second"])
    model.set_adapter("second")
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "second").eval()
    torch.testing.assert_close(logits(loaded, inputs), logits(model.eval(), inputs), **EXACT)
