"""What sparse adapters do beside what every method does (``tests/test_battery.py``)."""

import copy
import json
import threading

import jaxtyping
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from adapterbank.errors import AdapterBankError, AdapterError
from adapterbank.shira import ShiraTunerConfig
from adapterbank.shira.delta import SparseDelta
from adapterbank.shira.tuner.ops import sparse_linear
from tiny_models import MODELS, SPARSE_ROWS, TARGETS, adapter_layers, gpt2, llama, perturb, sparse, weights_of


@pytest.fixture(params=SPARSE_ROWS)
def fields(request):
    return SPARSE_ROWS[request.param]


@pytest.fixture
def model(fields):
    """A causal model with an adapter as if trained."""
    return perturb(get_peft_model(llama(), sparse(task_type="CAUSAL_LM", **fields))).eval()


def logits(model, inputs, **kwargs):
    with torch.no_grad():
        return model(**inputs, **kwargs).logits


def weights(model):
    """Of the base, whatever it is wrapped in."""
    names = ((n.removeprefix("base_model.model.").replace(".base_layer", ""), p) for n, p in model.named_parameters())
    return {name: p.detach().clone() for name, p in names if "sparse_" not in name}


def untouched(model):
    base = weights(llama())
    return all(torch.equal(value, base[name]) for name, value in weights(model).items())


# --- training ---------------------------------------------------------------------------------------------------------


def test_positions_are_as_many_as_asked_for(model):
    if model.peft_config["default"].mask != "struct":
        assert all(
            len(m.sparse_positions["default"]) == round(0.1 * m.shape[0] * m.shape[1]) for m in adapter_layers(model)
        )


def test_the_layer_is_the_base_layer_on_the_changed_weight(model):
    layer = adapter_layers(model)[0]
    x = torch.randn(3, 5, layer.in_features, requires_grad=True)
    changed = copy.deepcopy(layer.base_layer)
    changed.weight.data += layer.get_delta_weight("default")
    changed.weight.requires_grad_(True)
    one, other = layer(x), changed(x)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    grad_x, *grads = torch.autograd.grad(one.square().sum(), [x, *weights_of(layer)])
    dense_x, dense = torch.autograd.grad(other.square().sum(), [x, changed.weight])
    torch.testing.assert_close(grad_x, dense_x, rtol=1e-4, atol=1e-5)
    seen = dense.flatten()[layer.sparse_positions["default"].long()]
    for ours, theirs in zip(grads, torch.autograd.grad(layer.values("default"), weights_of(layer), seen), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_an_optimiser_holds_nothing_of_the_size_of_a_weight(model, inputs):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    assert untouched(model)
    # Adam: two numbers for each that is trained, and a step for each parameter
    state = [t for s in optimizer.state.values() for t in s.values()]
    assert sum(t.numel() for t in state) == 2 * sum(p.numel() for p in trained) + len(trained)


def test_no_saved_tensor_is_a_copy_of_a_weight(model, inputs):
    weight_storages = {p.data_ptr() for p in model.parameters()}
    shapes = {tuple(layer.shape) for layer in adapter_layers(model)} | {
        tuple(layer.shape)[::-1] for layer in adapter_layers(model)
    }
    copies = []

    def keep(tensor):
        if tuple(tensor.shape) in shapes and tensor.data_ptr() not in weight_storages:
            copies.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert copies == []


def test_two_forwards_before_the_backward_are_fine(model, inputs):
    two = model(**inputs, labels=inputs["input_ids"]).loss + model(**inputs, labels=inputs["input_ids"]).loss
    two.backward()
    found = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    (2 * model(**inputs, labels=inputs["input_ids"]).loss).backward()
    for ours, theirs in zip(found, (p.grad for p in model.parameters() if p.requires_grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_base_weight_that_is_not_frozen_gets_its_gradient(kind):
    layer = adapter_layers(perturb(get_peft_model(MODELS[kind](), sparse(target_modules=list(TARGETS[kind])))))[0]
    layer.base_layer.requires_grad_(True)
    x = torch.randn(3, 5, layer.in_features)
    changed = copy.deepcopy(layer.base_layer)
    changed.weight.data += layer.get_delta_weight("default").detach()
    for ours, theirs in zip(layer.base_layer.parameters(), changed.parameters(), strict=True):
        (one,) = torch.autograd.grad(layer(x).square().sum(), [ours])
        (other,) = torch.autograd.grad(changed(x).square().sum(), [theirs])
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_autocast_computes_in_its_type_and_sums_gradients_in_float32(inputs):
    model = perturb(get_peft_model(llama(), sparse())).train()
    with torch.autocast("cpu", torch.bfloat16):
        found = model(**inputs, labels=inputs["input_ids"])
    assert found.logits.dtype == torch.bfloat16
    found.loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_weights_in_float64_keep_their_digits():
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 6, dtype=torch.float64)
    expected, x = layer.weight.detach().clone(), torch.randn(3, 8, dtype=torch.float64)
    model = get_peft_model(torch.nn.Sequential(layer), ShiraTunerConfig(density=0.5, target_modules=["0"]))
    assert torch.equal(model(x), x @ expected.T + layer.bias)
    model.merge_adapter()
    assert torch.equal(layer.weight, expected)


def test_threads_that_compute_at_once_leave_the_base_as_it_was(model, inputs):
    expected, wrong = logits(model, inputs), []

    def work():
        for _ in range(30):
            if not torch.allclose(logits(model, inputs), expected, atol=1e-5):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and untouched(model)


def test_inputs_may_have_any_strides(model, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    layer = adapter_layers(model)[0]
    args = (
        torch.randn(16, 3, layer.in_features).transpose(0, 1).requires_grad_(True),
        layer.values("default").detach().requires_grad_(True), layer.base_layer.weight, layer.base_layer.bias,
        layer.sparse_positions["default"], False,
    )  # fmt: skip
    torch.library.opcheck(sparse_linear, args)


# --- saving and loading -----------------------------------------------------------------------------------------------


def test_the_file_is_a_sparse_delta_and_a_delta_is_such_a_file(model, inputs, tmp_path, fields):
    expected = logits(model, inputs)
    if "dora_rank" in fields:  # a checkpoint to train on; the delta is taken out of the live model
        delta, plain = SparseDelta.from_peft(model), llama()
    else:
        model.save_pretrained(tmp_path / "task")
        tensors = load_file(tmp_path / "task" / "adapter_model.safetensors")
        assert {name.rpartition(".")[2] for name in tensors} == {
            *("sparse_positions", "sparse_values", "sparse_fingerprint")
        }
        delta, plain = SparseDelta.load(tmp_path / "task"), llama()
    assert all(update.fingerprint is not None for update in delta.updates.values())
    delta.apply_(plain)
    torch.testing.assert_close(logits(plain, inputs), expected, rtol=1e-5, atol=1e-5)
    delta.save(tmp_path / "again", dtype=torch.float32)
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "again").eval()
    torch.testing.assert_close(logits(loaded, inputs), expected, rtol=0, atol=0)


def test_a_live_adapter_is_a_delta_without_a_file(model, inputs, tmp_path):
    SparseDelta.from_peft(model, name="task").save(tmp_path / "task", dtype=torch.float32)
    saved, live = SparseDelta.load(tmp_path / "task"), SparseDelta.from_peft(model, name="task")
    assert live.updates.keys() == saved.updates.keys() and live.config == saved.config
    for name, update in saved.updates.items():
        assert torch.equal(live.updates[name].positions, update.positions)
        assert torch.equal(live.updates[name].values, update.values)
        assert live.updates[name].fingerprint == update.fingerprint
    before = {name: update.values.clone() for name, update in live.updates.items()}
    perturb(model)
    assert all(torch.equal(update.values, before[name]) for name, update in live.updates.items())
    with pytest.raises(AdapterError, match="no sparse adapter 'other'"):
        SparseDelta.from_peft(model, "other")


def test_a_live_adapter_is_taken_at_the_strength_it_has_also_when_merged(model, inputs):
    for layer in adapter_layers(model):
        layer.set_scale("default", 0.5)
    expected, plain = logits(model, inputs), llama()
    SparseDelta.from_peft(model).apply_(plain)
    torch.testing.assert_close(logits(plain, inputs), expected, rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    other = llama()
    SparseDelta.from_peft(model).apply_(other)
    assert torch.equal(logits(other, inputs), logits(plain, inputs))
    model.unmerge_adapter()
    assert untouched(model)


def test_another_base_model_is_refused(model, inputs, tmp_path):
    model.save_pretrained(tmp_path / "task")
    other = llama()
    for parameter in other.parameters():
        parameter.data += 0.01
    loaded = PeftModel.from_pretrained(other, tmp_path / "task")
    for use in (lambda: loaded(**inputs), lambda: loaded.merge_adapter()):
        with pytest.raises(AdapterError, match="'default' was made for a base model with other weights"):
            use()


def test_another_base_model_is_refused_also_by_a_file_over_an_adapter_that_is_there(model, inputs, tmp_path):
    model.save_pretrained(tmp_path / "task")
    other = llama()
    for parameter in other.parameters():
        parameter.data += 0.01
    dora_rank = model.peft_config["default"].dora_rank
    there = get_peft_model(other, ShiraTunerConfig(density=0.1, mask="rand", dora_rank=dora_rank))
    there(**inputs)
    there.load_adapter(tmp_path / "task", "default")
    with pytest.raises(AdapterError, match="'default' was made for a base model with other weights"):
        there(**inputs)


def test_a_config_that_lies_is_refused_before_anything_is_allocated(model, tmp_path):
    model.save_pretrained(tmp_path / "task")
    path = tmp_path / "task" / "adapter_config.json"
    told = json.loads(path.read_text())
    told["counts"] = dict.fromkeys(told["counts"], 10**12)
    path.write_text(json.dumps(told))
    with pytest.raises(AdapterError, match=r"copy adapter_config\.json again"):
        PeftModel.from_pretrained(llama(), tmp_path / "task")


@pytest.mark.parametrize(
    "change", [lambda p: p.flip(0), lambda p: p + 10**6, lambda p: p - 10**6], ids=["order", "far", "negative"]
)
def test_positions_that_no_mask_gives_are_refused_before_they_are_used(model, inputs, tmp_path, change):
    model.save_pretrained(tmp_path / "task")
    path = tmp_path / "task" / "adapter_model.safetensors"
    tensors = {n: change(t).contiguous() if "positions" in n else t for n, t in load_file(path).items()}
    save_file(tensors, path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "task")
    for use in (lambda: loaded(**inputs), loaded.merge_adapter):
        with pytest.raises(AdapterError, match="positions don't ascend within"):
            use()
    assert untouched(loaded)


@pytest.mark.parametrize("kind", ["trained", "merged", "uncalibrated", "just loaded"])
def test_a_file_of_any_size_goes_over_an_adapter_that_is_there(model, inputs, tmp_path, kind, fields):
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path / "task")
    changed = {"mask": "snip" if kind == "uncalibrated" else "rand", "density": 0.07, "part": 0}
    other = get_peft_model(llama(), sparse(task_type="CAUSAL_LM", **(fields | changed))).eval()
    if kind == "merged":
        perturb(other).merge_adapter()
    if kind == "just loaded":  # and not looked at yet
        perturb(other).save_pretrained(tmp_path / "other")
        other = PeftModel.from_pretrained(llama(), tmp_path / "other").eval()
    held = [p for layer in adapter_layers(other) for p in weights_of(layer)]
    other.load_adapter(tmp_path / "task", "default")
    torch.testing.assert_close(logits(other, inputs), expected, rtol=0, atol=0)
    assert untouched(other)
    assert all(
        one is p for one, p in zip((p for layer in adapter_layers(other) for p in weights_of(layer)), held, strict=True)
    )
    other.save_pretrained(tmp_path / "again")
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "again").eval()
    torch.testing.assert_close(logits(loaded, inputs), expected, rtol=0, atol=0)


def test_a_file_of_another_kind_does_not_go_over_an_adapter(model, fields):
    other = get_peft_model(llama(), sparse(dora_rank=0 if "dora_rank" in fields else 2))
    with pytest.raises(AdapterError, match=r"'default' is .* positions for .*q_proj, but no sparse_.* a new name"):
        set_peft_model_state_dict(model, get_peft_model_state_dict(other))


def test_a_dora_of_another_rank_does_not_go_over_an_adapter(inputs, tmp_path):
    perturb(get_peft_model(llama(), sparse(dora_rank=4))).save_pretrained(tmp_path)
    there = perturb(get_peft_model(llama(), sparse(dora_rank=2))).eval()
    expected = logits(there, inputs)
    with pytest.raises(
        AdapterError, match=r"'default' is a DoRA of rank 2 in .*q_proj, the file's is of rank 4; load it"
    ):
        there.load_adapter(tmp_path, "default")
    assert torch.equal(logits(there, inputs), expected)
    there.load_adapter(tmp_path, "other")  # as it says
    there.set_adapter("other")
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.equal(logits(there.eval(), inputs), logits(loaded, inputs))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("sparse_values", lambda t: t[1:], r"doesn't fit: sparse_values\.default of .*q_proj is \(101,\) .* \(102,\)"),
        ("sparse_positions", lambda t: t[None], r"doesn't fit: sparse_positions\.default .* \(1, 102\) .* \(102,\)"),
        ("sparse_dora.A", lambda t: t[:, 1:], r"doesn't fit: sparse_dora\.default\.A .* \(3, 31\) .* \(3, 32\)"),
        ("sparse_dora.A", lambda t: t[1:], "is a DoRA of rank 3 in .*q_proj, the file's is of rank 2"),
        ("sparse_dora.magnitude", lambda t: None, r"but no sparse_dora\.default\.magnitude"),
    ],
)
def test_tensors_that_do_not_go_together_are_refused(tmp_path, part, change, message):
    get_peft_model(llama(), sparse(dora_rank=3 if "dora" in part else 0)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {n: change(t) if n.endswith(f"q_proj.{part}") else t for n, t in load_file(path).items()}
    save_file({n: t.contiguous() for n, t in tensors.items() if t is not None}, path)
    with pytest.raises(AdapterError, match=message):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_a_file_that_does_not_fit_one_layer_changes_none(model, inputs):
    state = {name: torch.zeros_like(t) if t.is_floating_point() else t
             for name, t in get_peft_model_state_dict(model).items()}  # fmt: skip
    last = max(name for name in state if "positions" in name)
    state[last] = state[last][None]
    expected = logits(model, inputs)
    with pytest.raises(AdapterError, match=r"doesn't fit: sparse_positions\.default"):
        set_peft_model_state_dict(model, state)
    assert torch.equal(logits(model, inputs), expected)


def test_values_that_are_no_numbers_are_refused_before_they_are_used(model, inputs, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {n: torch.full_like(t, float("nan")) if t.is_floating_point() else t for n, t in load_file(path).items()}
    save_file(tensors, path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    for use in (lambda: loaded(**inputs), loaded.merge_adapter):
        with pytest.raises(AdapterError, match="its values hold nan or inf; take an earlier checkpoint"):
            use()
    assert untouched(loaded)


def test_a_saved_config_alone_makes_no_adapter(model, inputs, tmp_path):
    model.save_pretrained(tmp_path / "task")
    empty = get_peft_model(llama(), PeftConfig.from_pretrained(tmp_path / "task"))
    with pytest.raises(AdapterError, match="whose file wasn't loaded"):
        empty(**inputs)


# --- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [False, True])
def test_merging_changes_no_output_and_unmerging_brings_back_every_bit(model, inputs, safe):
    expected = logits(model, inputs)
    for _ in range(20):
        model.merge_adapter(safe_merge=safe)
        assert not untouched(model)
        torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-5, atol=1e-6)
        model.unmerge_adapter()
    assert untouched(model)


@pytest.mark.parametrize(
    "types",
    [["bfloat16"], ["float16"], ["float64"], ["bfloat16", "float32"], ["float16", "bfloat16"]],
    ids=" then ".join,
)
def test_unmerging_brings_back_every_bit_also_of_a_model_that_changed_its_type(model, types):
    model.merge_adapter()
    base = llama()
    for dtype in types:
        model.to(getattr(torch, dtype))
        base.to(getattr(torch, dtype))
    model.unmerge_adapter()
    expected = weights(base)
    assert all(torch.equal(value, expected[name]) for name, value in weights(model).items())


def test_disabling_gives_the_base_model_also_when_merged(model, inputs):
    expected = logits(model, inputs)
    for merge in (False, True):
        if merge:
            model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(logits(model, inputs), logits(llama(), inputs))
        torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=1e-6)


# --- several adapters -------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(model, fields):
    """A second adapter, of other positions."""
    second = {**fields, "mask": "rand", "seed": 8, "part": 0}
    model.add_adapter("second", sparse(task_type="CAUSAL_LM", **second))
    perturb(model, "second", seed=5)
    return model.eval()


def test_both_at_once_are_the_sum_also_where_they_overlap(pair):
    layer = adapter_layers(pair)[0]
    pair.base_model.set_adapter(["default", "second"])
    x = torch.randn(9, layer.in_features)
    changed = layer.base_layer.weight + layer.get_delta_weight("default") + layer.get_delta_weight("second")
    torch.testing.assert_close(layer(x), x @ changed.T, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(layer(x).square().sum(), [*weights_of(layer), *weights_of(layer, "second")])
    assert all(g.any() for g in grads)
    pair.merge_adapter()
    torch.testing.assert_close(layer(x), x @ changed.T, rtol=1e-5, atol=1e-5)
    pair.unmerge_adapter()
    assert untouched(pair)


def test_loaded_adapters_that_overlap_merge_together(pair, tmp_path, inputs):
    pair.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    loaded.load_adapter(tmp_path / "second", "second")
    loaded.merge_adapter(["default", "second"])
    pair.merge_adapter(["default", "second"])
    assert torch.equal(logits(loaded.eval(), inputs), logits(pair, inputs))
    loaded.unmerge_adapter()
    assert untouched(loaded)


@pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")
def test_adapters_that_overlap_merge_one_after_the_other_and_are_saved_meanwhile(pair, tmp_path):
    pair.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    loaded.load_adapter(tmp_path / "second", "second")
    loaded.merge_adapter(["default"])
    loaded.save_pretrained(tmp_path / "meanwhile")
    loaded.merge_adapter(["second"])
    pair.merge_adapter(["default", "second"])
    ours, theirs = weights(loaded), weights(pair)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    loaded.unmerge_adapter()
    assert untouched(loaded)
    PeftModel.from_pretrained(llama(), tmp_path / "meanwhile" / "second").merge_adapter()


def test_a_mask_is_chosen_on_the_base_also_while_another_adapter_is_merged(model):
    model.merge_adapter()
    model.add_adapter("second", sparse(task_type="CAUSAL_LM", density=0.5))
    fresh = get_peft_model(llama(), sparse(density=0.5))
    for one, other in zip(adapter_layers(model), adapter_layers(fresh), strict=True):
        assert torch.equal(one.sparse_positions["second"], other.sparse_positions["default"])


# --- models and refusals ----------------------------------------------------------------------------------------------


def test_conv1d_has_its_weight_the_other_way_round():
    model = perturb(get_peft_model(gpt2(), sparse(target_modules=["c_attn"])))
    layer = adapter_layers(model)[0]
    x = torch.randn(2, 5, layer.in_features, requires_grad=True)
    changed = copy.deepcopy(layer.base_layer)
    changed.weight.data += layer.get_delta_weight("default")
    changed.weight.requires_grad_(True)
    torch.testing.assert_close(layer(x), changed(x), rtol=1e-5, atol=1e-6)
    (found,) = torch.autograd.grad(layer(x).square().sum(), [layer.sparse_values["default"]])
    (dense,) = torch.autograd.grad(changed(x).square().sum(), [changed.weight])
    positions = layer.sparse_positions["default"].long()
    torch.testing.assert_close(found, dense.flatten()[positions], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"density": 0.0}, "is no share"), ({"density": 2.0}, "is no share"),
        ({"mask": "best"}, "mask='best' is unknown"), ({"dora_rank": -1}, "dora_rank=-1 is no rank"),
        ({"part": 1, "mask": "rand"}, "only wm, grad and snip have parts"), ({"offset": 1}, "only struct has rows"),
        ({"layers_pattern": "layers"}, "does nothing without layers_to_transform"),
    ],
)  # fmt: skip
def test_impossible_configs_are_refused(fields, message):
    with pytest.raises(AdapterBankError, match=message):
        sparse(**fields)


def test_what_is_no_linear_layer_is_refused():
    with pytest.raises(AdapterBankError, match="Embedding is no linear layer"):
        get_peft_model(llama(), sparse(target_modules=["embed_tokens"]))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_a_weight_that_another_parameter_is_too_is_refused():
    base = gpt2()
    with pytest.raises(AdapterBankError, match=r"wte\.weight and lm_head\.weight are one tensor"):
        get_peft_model(base, sparse(target_modules=["c_attn", "lm_head"]))
    assert not adapter_layers(base)


def test_weights_of_a_type_that_can_not_be_changed_are_refused():
    model = llama()
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = torch.nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(AdapterBankError, match=r"is torch\.float8_e4m3fn .* load the base model unquantised"):
        get_peft_model(model, sparse())


def test_rows_of_a_batch_can_not_have_adapters_of_their_own(model, inputs):
    with pytest.raises(AdapterBankError, match="group rows by adapter"):
        model(**inputs, adapter_names=["default"] * 4)


def test_masks_by_the_gradient_need_it(inputs):
    model = get_peft_model(llama(), sparse(mask="snip"))
    with pytest.raises(AdapterBankError, match=r"calibrate\(model, batches\) before training"):
        model.train()(**inputs)
