"""Files of ours, and PEFT's in and out: the real PEFT writes and reads them."""

from dataclasses import replace

import pytest
import torch
from peft import PeftModel, ShiraConfig, SupertuningConfig, get_peft_model
from safetensors.torch import load_file

from adapterbank.errors import AdapterBankError, AdapterError, MissingFileError
from adapterbank.shira import ShiraTunerConfig, files
from adapterbank.shira.delta import SparseDelta
from damage import spoil
from sparse import Net, make_delta
from tiny_models import gpt2, llama

BOTH = ("first.weight", "body.q.weight")


def same(one, other, tolerance=0.0):
    assert one.updates.keys() == other.updates.keys()
    for name, update in one.updates.items():
        there = other.updates[name]
        assert torch.equal(update.positions, there.positions)
        assert update.shape == there.shape
        torch.testing.assert_close(update.values.float(), there.values.float(), rtol=tolerance, atol=0)


def outputs(model):
    torch.manual_seed(1)
    x, y = torch.randn(5, 30), torch.randn(5, 40)
    return torch.cat([model.first(x), model.body["q"](y)])


def with_delta(delta, **options):
    model = Net()
    delta.apply_(model, **options)
    return outputs(model)


def rank_count(r):
    """A delta with the counts that PEFT's SHiRA asks for."""
    weights, tensors = dict(Net().named_parameters()), {}
    for name in BOTH:
        count = r * sum(weights[name].shape)
        drawn = torch.Generator().manual_seed(count)
        tensors[name] = torch.randperm(weights[name].numel(), generator=drawn)[:count], torch.randn(count)
    return SparseDelta.from_tensors(tensors, {n: tuple(weights[n].shape) for n in BOTH}, weights=weights)


# --- ours -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_is_saved_is_loaded(tmp_path, dtype):
    fields = {"base": "org/base", "mask": "wm", "config": {"task_type": "SEQ_CLS"}, "name": "law"}
    delta = replace(make_delta(Net(), extras={"score.weight": torch.randn(2, 3)}, **fields), seed=3)
    delta.save(tmp_path / "law", dtype=dtype)
    loaded = SparseDelta.load(tmp_path / "law")
    rounded = {n: replace(u, values=u.values.to(dtype)) for n, u in delta.updates.items()}
    same(loaded, replace(delta, updates=rounded))
    assert (loaded.name, loaded.base, loaded.mask, loaded.seed) == ("law", "org/base", "wm", 3)
    assert loaded.config == {"task_type": "SEQ_CLS"}
    assert torch.equal(loaded.extras["score.weight"], delta.extras["score.weight"])
    for name, update in delta.updates.items():
        assert loaded.updates[name].fingerprint == update.fingerprint
    with pytest.raises(AdapterError, match="has other values than the base model it was made for, org/base"):
        loaded.apply_(Net(seed=1), heads=False)


def test_a_value_takes_six_bytes_in_16_bits_and_half_of_peft_s(tmp_path):
    delta = rank_count(3)
    delta.save(tmp_path / "ours")
    files.save_as_shira(delta, tmp_path / "peft")
    ours, theirs = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("ours", "peft"))
    fingerprints = 2 * 24
    assert sum(tensor.nbytes for tensor in ours.values()) == 6 * delta.nnz + fingerprints
    assert sum(tensor.nbytes for tensor in theirs.values()) == 12 * delta.nnz


@pytest.mark.parametrize(("scale", "expected"), [(1e-2, torch.float16), (1e6, torch.bfloat16), (1e-9, torch.bfloat16)])
def test_the_nearer_of_the_two_16_bit_types_is_taken(tmp_path, scale, expected):
    make_delta(Net(), scale=scale).save(tmp_path / "a")
    assert SparseDelta.load(tmp_path / "a").updates["first.weight"].values.dtype == expected


def test_values_that_do_not_fit_are_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(AdapterError, match=r"too large for torch\.float16; write bfloat16 or float32"):
        make_delta(Net(), scale=1e6).save(tmp_path / "a", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


# --- PEFT's -----------------------------------------------------------------------------------------------------------


# PEFT's SHiRA makes sparse tensors without a word on their checks
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize(
    ("write", "read"),
    [(files.save_as_shira, ShiraConfig), (files.save_as_supertuning, SupertuningConfig)],
    ids=["SHiRA", "Super-Tuning"],
)
def test_peft_loads_what_we_write_with_equal_outputs(tmp_path, write, read):
    delta = rank_count(2) if read is ShiraConfig else make_delta(Net())
    write(delta, tmp_path / "theirs")
    model = PeftModel.from_pretrained(Net(), tmp_path / "theirs").eval()
    assert isinstance(model.peft_config["default"], read)
    torch.testing.assert_close(outputs(model.base_model.model), with_delta(delta), rtol=0, atol=1e-6)
    same(SparseDelta.load(tmp_path / "theirs", model=Net()), delta)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize(
    "config",
    [
        ShiraConfig(r=2, target_modules=["first", "q"], init_weights=False, random_seed=5),
        SupertuningConfig(sparsity=0.9, target_modules=["first", "q"], init_weights=False),
    ],
    ids=["SHiRA", "Super-Tuning"],
)
def test_we_load_what_peft_writes_with_equal_outputs(tmp_path, config):
    torch.manual_seed(0)
    model = get_peft_model(Net(), config).eval()
    model.save_pretrained(tmp_path)
    delta = SparseDelta.load(tmp_path, model=Net(), name="theirs")
    assert set(delta.updates) == set(BOTH)
    assert delta.mask == ("random" if isinstance(config, ShiraConfig) else "wm")
    torch.testing.assert_close(outputs(model.base_model.model), with_delta(delta), rtol=0, atol=1e-6)


def test_a_mask_of_somebody_s_own_comes_through(tmp_path):
    config = ShiraConfig(r=2, target_modules=["first", "q"], init_weights=False)

    def first_ones(layer, r, **_):
        mask = torch.zeros(layer.weight.numel())
        mask[: r * sum(layer.weight.shape)] = 1
        return mask.view_as(layer.weight)

    config.mask_fn = first_ones
    get_peft_model(Net(), config).save_pretrained(tmp_path)
    delta = SparseDelta.load(tmp_path, model=Net(), name="theirs")
    assert delta.updates["first.weight"].positions.tolist() == list(range(140))


def test_counts_that_peft_can_not_hold_are_refused_by_the_layer(tmp_path):
    with pytest.raises(AdapterError, match=r"first has 120: r would be 1\.714"):
        files.save_as_shira(make_delta(Net(), only=("first.weight",)), tmp_path / "a")
    uneven = {**make_delta(Net(), density=0.5).updates, "first.weight": make_delta(Net()).updates["first.weight"]}
    with pytest.raises(AdapterError, match="one sparsity for all layers"):
        files.save_as_supertuning(SparseDelta(name="a", updates=uneven), tmp_path / "a")
    assert not (tmp_path / "a").exists()


# --- damaged ----------------------------------------------------------------------------------------------------------


AT = "base_model.model.first.sparse_"
DAMAGED = [
    ({"peft_type": "LORA"}, None, "its peft_type is 'LORA', expected SPARSE_SHIRA, SHIRA, SUPERTUNING"),
    ({"shapes": None}, None, "its config says no shape of body.q"),
    ({"shapes": {"first": [40, 30], "body.q": [40, -1]}}, None, "its config says no shape of body.q"),
    ({"shapes": {"first": [4, 3], "body.q": [40, 40]}}, None, r"first\.weight: positions reach from \d+ to \d+"),
    (
        {},
        lambda t: t.update({AT + "fingerprint": torch.zeros(2)}),
        r"fingerprint is torch\.float32 \(2,\), expected int64",
    ),
    ({}, lambda t: t.pop(AT + "values"), "first has no values"),
    ({}, lambda t: t.clear(), "holds no sparse_values"),
    (
        {},
        lambda t: t.update({AT + "values": torch.zeros(3)}),
        r"positions are torch\.int32 \(120,\), values torch\.float32 \(3,\)",
    ),
    ({}, lambda t: t.update({AT + "values": torch.full((120,), float("nan"))}), "nan or inf"),
    ({}, lambda t: t.update({AT + "positions": torch.zeros(120, dtype=torch.int32)}), "ascend without repetition"),
    ({}, lambda t: t.update({AT + "positions": torch.zeros(120)}), r"positions are torch\.float32"),
    ({}, lambda t: t.update({"base_model.model.first.sparse_other": torch.zeros(1)}), "no part of a plain sparse"),
    ({}, lambda t: t.update({"base_model.model.a.modules_to_save.w": torch.zeros(1)}), "a whole live model"),
]


@pytest.mark.parametrize(("fields", "change", "message"), DAMAGED, ids=[str(i) for i in range(len(DAMAGED))])
def test_every_damage_is_one_clear_error(tmp_path, fields, change, message):
    make_delta(Net()).save(tmp_path / "law")
    spoil(tmp_path / "law", change or (lambda tensors: None), **fields)
    with pytest.raises(AdapterError, match=f"adapter 'law'.*{message}"):
        SparseDelta.load(tmp_path / "law")


def test_a_file_that_was_cut_anywhere_is_an_error(tmp_path):
    make_delta(Net()).save(tmp_path / "law")
    path = tmp_path / "law" / "adapter_model.safetensors"
    data = path.read_bytes()
    for length in range(0, len(data), 61):
        path.write_bytes(data[:length])
        with pytest.raises(AdapterBankError):
            SparseDelta.load(tmp_path / "law")


def test_what_is_not_there_and_what_needs_the_base_say_so(tmp_path):
    with pytest.raises(MissingFileError):
        SparseDelta.load(tmp_path / "nothing")
    with pytest.raises(AdapterError, match="a state dict doesn't say what it is; pass config="):
        SparseDelta.load({"a.sparse_values": torch.zeros(1)})
    files.save_as_supertuning(make_delta(Net()), tmp_path / "theirs")
    with pytest.raises(AdapterError, match="pass model=, the base model"):
        SparseDelta.load(tmp_path / "theirs")
    with pytest.raises(AdapterError, match=r"the model has no matrix body\.q\.weight"):
        SparseDelta.load(tmp_path / "theirs", model=torch.nn.Linear(2, 2))


# --- what live models write ------------------------------------------------------------------------------------------


def trained(make, **fields):
    """A live model with a sparse adapter that has learned something."""
    model = get_peft_model(make(), ShiraTunerConfig(density=0.1, mask="wm", **fields))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    return model


def test_an_adapted_output_layer_is_read_though_peft_saves_its_base_layer_too(tmp_path):
    model = trained(llama, target_modules=["lm_head", "q_proj"])
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any(".base_layer." in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    delta = SparseDelta.load(tmp_path)
    assert not delta.extras and "lm_head.weight" in delta.updates


def test_an_adapter_of_gpt_2_says_how_its_layers_are_stored(tmp_path):
    model = trained(gpt2, target_modules=["c_attn"])
    model.save_pretrained(tmp_path / "a")
    delta = SparseDelta.load(tmp_path / "a")
    lora, _ = delta.to_lora(32)
    update = next(iter(delta.updates.values())).dense()
    torch.testing.assert_close(lora.factors(next(iter(lora.modules))).update(), update.T, rtol=1e-3, atol=1e-4)
    delta.save(tmp_path / "b")
    assert SparseDelta.load(tmp_path / "b").config["fan_in_fan_out"]


@pytest.mark.parametrize("write", [files.save_as_shira, files.save_as_supertuning])
def test_peft_is_given_no_layers_that_it_does_not_take(tmp_path, write):
    delta = SparseDelta.from_peft(trained(gpt2, target_modules=["c_attn"]))
    with pytest.raises(AdapterError, match="its layers are GPT-2's Conv1D, which PEFT's SHiRA and Super-Tuning don't"):
        write(delta, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("write", [files.save, files.save_as_shira, files.save_as_supertuning])
def test_what_changes_nothing_is_not_written(tmp_path, write):
    with pytest.raises(AdapterError, match="adapter 'a' changes nothing; there is nothing to write"):
        write(SparseDelta(name="a", updates={}), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_layers_without_values_are_ours_and_not_peft_s(tmp_path):
    nothing = {"first.weight": (torch.zeros(0, dtype=torch.int64), torch.zeros(0))}
    delta = SparseDelta.from_tensors(nothing, {"first.weight": (40, 30)})
    delta.save(tmp_path / "ours")
    assert SparseDelta.load(tmp_path / "ours").updates["first.weight"].density == 0
    with pytest.raises(AdapterError, match="a layer has no values, which PEFT's Super-Tuning doesn't take"):
        files.save_as_supertuning(delta, tmp_path / "theirs")


def test_a_dora_in_training_is_told_from_a_sparse_adapter(tmp_path):
    model = trained(llama, target_modules=["q_proj"], dora_rank=2)
    model.save_pretrained(tmp_path)
    with pytest.raises(
        AdapterError, match=r"a DoRA in training; load it with PeftModel, and take SparseDelta\.from_peft"
    ):
        SparseDelta.load(tmp_path)
    assert SparseDelta.from_peft(model).nnz
