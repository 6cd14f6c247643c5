import pytest
import torch

from adapterbank.adapters.peft_keys import sort_keys
from adapterbank.adapters.tensors import TensorEntry
from adapterbank.errors import AdapterError

P = "base_model.model."


def sort(*names, shape=(4, 8)):
    return sort_keys({name: TensorEntry(torch.float32, shape) for name in names}, "adapter 'law'")


@pytest.mark.parametrize("prefix", [P, ""])
@pytest.mark.parametrize("end", [".weight", ".default.weight", ".my-adapter.weight", "", ".default"])
def test_every_way_peft_writes_a_pair_gives_one_module(prefix, end):
    stored = f"{prefix}a.q.lora_A{end}", f"{prefix}a.q.lora_B{end}"
    keys, extras = sort(*stored)
    assert {module: (pair.A, pair.B) for module, pair in keys.items()} == {"a.q": stored}
    assert extras == {}


def test_heads_and_biases_are_extras_under_their_own_names():
    pair = (f"{P}q.lora_A.weight", f"{P}q.lora_B.weight")
    _, extras = sort(*pair, f"{P}score.weight", f"{P}q.lora_B.bias", f"{P}q.base_layer.bias", f"{P}norm.bias")
    assert extras == {
        "score.weight": f"{P}score.weight",
        "q.lora_B.bias": f"{P}q.lora_B.bias",
        "q.base_layer.bias": f"{P}q.base_layer.bias",
        "norm.bias": f"{P}norm.bias",
    }


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([f"{P}q.lora_A.weight"], "adapter 'law', q: lora_B is missing"),
        ([f"{P}q.lora_B.weight"], "adapter 'law', q: lora_A is missing"),
        ([], "no LoRA weights, only nothing"),
        ([f"{P}score.weight"], "no LoRA weights, only 'base_model.model.score.weight' and 0 others"),
        ([f"{P}q.lora_magnitude_vector"], "adapter 'law', q: it is a DoRA"),
        ([f"{P}emb.lora_embedding_A"], "adapter 'law', emb: it adapts an embedding"),
        (["lora_unet_down.lora_down.weight"], "unknown layout, expected base_model.model.<module>.lora_A.weight"),
        ([f"{P}q.lora_diag"], "unknown layout"),
        ([f"{P}q.lora_A.a.b.weight"], "unknown layout"),
        ([f"{P}q.lora_A.bias"], "unknown layout"),
        (["lora_A.weight"], "unknown layout"),
        ([f"{P}q.lora_A.weight", "q.lora_A.weight"], "are the same tensor; keep one"),
        ([f"{P}q.lora_A.a.weight", f"{P}q.lora_B.b.weight"], r"mixes 2 adapters \(a, b\); give one"),
        ([f"{P}q.base_layer.weight"], "belongs to a whole live model"),
        ([f"{P}score.modules_to_save.default.weight"], "belongs to a whole live model.*from_peft"),
        ([f"{P}q.lora_{x}" for x in "ABE"], "unknown layout"),
    ],
)
def test_other_names_are_refused(names, message):
    with pytest.raises(AdapterError, match=message):
        sort(*names)


def test_adalora_has_singular_values_beside_each_pair():
    entries = {
        f"{P}q.lora_{x}": TensorEntry(torch.float32, s) for x, s in [("A", (4, 8)), ("B", (6, 4)), ("E", (3, 1))]
    }
    keys, _ = sort_keys(entries, "x", adalora=True)
    assert [pair.E for pair in keys.values()] == [f"{P}q.lora_E"]
    with pytest.raises(AdapterError, match=r"lora_E is \(3, 1\), expected \(4, 1\)"):
        keys["q"].shape(entries, 4, "x, q")
    del entries[f"{P}q.lora_E"]
    with pytest.raises(AdapterError, match="x, q: lora_E is missing"):
        sort_keys(entries, "x", adalora=True)


@pytest.mark.parametrize(
    ("A", "B", "message"),
    [
        ((4, 8, 3, 3), (6, 4, 1, 1), "convolutions and stacked experts are not supported"),
        ((4,), (6, 4), r"A is \(4,\) and B is \(6, 4\), expected \(r, d_in\)"),
        ((4, 0), (6, 4), "were the shards gathered"),
        (
            (8, 4),
            (4, 6),
            r"A is \(8, 4\) and B is \(4, 6\), expected A \(4, d_in\) and B \(d_out, 4\): they are transposed",
        ),
        ((5, 8), (6, 5), "A has 5 rows, expected 4 by the config's r and rank_pattern, so the scale would be wrong"),
        ((4, 8), (6, 5), "A has 4 rows and B has 5 columns"),
    ],
)
def test_shapes_are_checked_against_each_other_and_the_config(A, B, message):
    names = (f"{P}q.lora_A.weight", f"{P}q.lora_B.weight")
    entries = {n: TensorEntry(torch.float32, s) for n, s in zip(names, (A, B), strict=True)}
    keys, _ = sort_keys(entries, "adapter 'law'")
    with pytest.raises(AdapterError, match=f"adapter 'law', q: .*{message}"):
        keys["q"].shape(entries, 4, "adapter 'law', q")


def test_whole_numbers_are_no_factors():
    names = (f"{P}q.lora_A.weight", f"{P}q.lora_B.weight")
    entries = {n: TensorEntry(torch.int8, (4, 4)) for n in names}
    with pytest.raises(AdapterError, match=r"holds torch.int8, expected floats"):
        sort_keys(entries, "x")[0]["q"].shape(entries, 4, "x, q")
