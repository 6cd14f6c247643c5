import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterbank.adapters import ModuleShape
from adapterbank.adapters.peft_config import Scaling, clean_config, read_config, refuse_variants, written_config
from adapterbank.errors import AdapterError, MissingFileError

PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}
Q = "model.layers.0.self_attn.q_proj"


def scaling(**fields):
    return Scaling(clean_config(PLAIN | fields, "adapter 'x'"), "adapter 'x'")


def test_scale_is_alpha_over_rank():
    assert scaling().scale(Q) == 2
    assert scaling(use_rslora=True).scale(Q) == 16 / math.sqrt(8)


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ({"q_proj": 4}, True),
        ({Q: 4}, True),
        ({"^" + Q: 4}, True),
        ({r".*layers\.[0-3]\..*": 4}, True),
        ({"layers.0": 4}, False),
        ({"proj": 4}, False),
        ({"k_proj": 2, "q_proj": 4, "self_attn.q_proj": 6}, True),
        ({"q_proj": None}, False),
        ({}, False),
        (None, False),
    ],
)
def test_patterns_match_by_pefts_rule(pattern, matches):
    assert scaling(rank_pattern=pattern).rank(Q) == (4 if matches else 8)
    assert scaling(alpha_pattern=pattern).scale(Q) == (4 / 8 if matches else 2)


def test_patterns_agree_with_peft():
    other = pytest.importorskip("peft.utils.other")
    names = [Q, "a.q_proj", "q_proj", "xq_proj", "layers.10.q", "layers.1.q"]
    for keys in (["q_proj"], ["layers.1.q"], [r"layers\.\d.q"], ["^q_proj", "q_proj"], ["(a|b).q_proj"], ["l", "q"]):
        for name in names:
            theirs = other.get_pattern_key(keys, name)
            pattern = {key: i + 100 for i, key in enumerate(keys)}
            assert scaling(rank_pattern=pattern).rank(name) == pattern.get(theirs, 8)


@pytest.mark.parametrize("key", ["(a+)+$", "(a|a)*b", "(x{1,9}){9}", "a*a*a*a*a*", "a" * 1001])
def test_patterns_that_could_run_for_years_are_refused(key):
    with pytest.raises(AdapterError, match="too complex to match safely; write names out"):
        scaling(rank_pattern={key: 4})


def test_a_broken_pattern_is_refused():
    with pytest.raises(AdapterError, match="no regular expression"):
        scaling(alpha_pattern={"(": 4})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "has rank 0, expected at least 1"),
        ({"r": "8"}, "has r='8'; PEFT never writes that"),
        ({"r": True}, "has r='True'"),
        ({"r": None}, "has no r, so the scale of the update is unknown"),
        ({"lora_alpha": None}, "has no lora_alpha"),
        ({"lora_alpha": math.nan}, "has lora_alpha='nan', expected a finite number"),
        ({"lora_alpha": math.inf}, "has lora_alpha='inf'"),
        ({"rank_pattern": [1]}, r"has rank_pattern='\[1\]'"),
        ({"rank_pattern": {"q": 1.5}}, "rank 1.5, expected a whole number"),
        ({"rank_pattern": {"q": 0}}, "rank 0.0, expected a whole number"),
        ({"alpha_pattern": {"q": "1"}}, r"has alpha_pattern\['q'\]='1', expected a finite number"),
        ({"target_modules": [1]}, r"has target_modules='\[1\]'; PEFT never writes that"),
        ({"modules_to_save": ["a\n"]}, "has modules_to_save="),
        ({"layers_to_transform": ["1"]}, "has layers_to_transform="),
        ({"base_model_name_or_path": "a\x1b[31m"}, r"'a\\x1b\[31m', expected printable characters"),
        ({"use_rslora": 1}, "has use_rslora='1'"),
    ],
)
def test_unusable_numbers_are_refused_by_field(fields, message):
    with pytest.raises(AdapterError, match=message):
        scaling(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "its peft_type is 'IA3', expected 'LORA' or 'ADALORA'"),
        ({"peft_type": "LOHA"}, "convert it with peft.convert_to_lora"),
        ({"use_dora": True}, "it is a DoRA.*full rank.*merge_and_unload.*truncated SVD"),
        ({"alora_invocation_tokens": [1]}, "activated LoRA.*train without alora_invocation_tokens"),
        ({"layer_replication": [[0, 1]]}, "layer_replication changes the base model's layers"),
        ({"target_parameters": ["experts.up"]}, "target_parameters adapt bare parameters.*train with target_modules"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices change rows of the embedding"),
        ({"use_qalora": True}, "QALoRA"),
        ({"use_bdlora": {}, "kasa_config": {"a": 1}}, "KaSA"),
        ({"use_bdlora": {"a": 1}}, "BD-LoRA"),
        ({"monteclora_config": {"a": 1}}, "MonteCLoRA"),
        ({"arrow_config": {"a": 1}}, "Arrow router"),
        *(
            ({"init_lora_weights": init}, f"init_lora_weights='{init}' .*path_initial_model_for_weight_conversion")
            for init in ("pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "something_new")
        ),
        ({"init_lora_weights": "loftq"}, "LoftQ"),
    ],
)
def test_variants_are_refused_with_reason_and_way_out(fields, message):
    with pytest.raises(AdapterError, match=f"adapter 'law'.*{message}"):
        refuse_variants(PLAIN | fields, "adapter 'law'")


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica", None])
def test_inits_that_leave_the_base_alone_pass(init):
    refuse_variants(PLAIN | ({} if init is None else {"init_lora_weights": init}), "adapter 'law'")


def test_cleaning_keeps_what_matters_and_no_path():
    config = PLAIN | {
        "base_model_name_or_path": "/home/me/llama",
        "task_type": "CAUSAL_LM",
        "corda_config": {"cache_file": "/home/me/cache"},
        "my_private_key": "/home/me",
        "bias": None,
        "auto_mapping": {"base_model_class": "/home/me", "parent_library": "os"},
    }
    assert clean_config(config, "x") == PLAIN | {"base_model_name_or_path": "llama", "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize("text", ["{ not json", "\xff", "[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_a_broken_config_is_named(tmp_path, text):
    path = tmp_path / "adapter_config.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(AdapterError, match=r"adapter 'law': .*adapter_config.json is broken JSON"):
        read_config(path, "adapter 'law'")


@pytest.mark.parametrize(("text", "kind"), [("[]", "list"), ("1", "int"), ("null", "NoneType")])
def test_a_config_that_is_no_object_is_named(tmp_path, text, kind):
    path = tmp_path / "adapter_config.json"
    path.write_text(text)
    with pytest.raises(AdapterError, match=f"holds a {kind}, expected a JSON object"):
        read_config(path, "adapter 'law'")


def test_a_missing_or_huge_config_is_named(tmp_path):
    path = tmp_path / "adapter_config.json"
    with pytest.raises(MissingFileError, match=re.escape(f"adapter 'law': {path} does not exist")):
        read_config(path, "adapter 'law'")
    path.write_bytes(b" " * 10_000_001)
    with pytest.raises(AdapterError, match="which is no LoRA's config"):
        read_config(path, "adapter 'law'")


@settings(deadline=None)
@given(
    ranks=st.lists(st.integers(1, 64), min_size=1, max_size=6),
    scales=st.lists(st.floats(0.01, 100) | st.just(2.0), min_size=6, max_size=6),
)
def test_what_is_written_is_read_back_with_the_same_ranks_and_scales(ranks, scales):
    # one name ends in another, and dots must not match other characters: the two traps of PEFT's suffix regexes
    names = ["a.q", "b.a.q", "b.a.qq", "b.axq", "layers.1.q", "layers.11.q"][: len(ranks)]
    shapes = {n: ModuleShape(rank=r, d_in=64, d_out=64) for n, r in zip(names, ranks, strict=True)}
    given_scales = dict(zip(names, scales, strict=False))
    config = json.loads(json.dumps(written_config(PLAIN, "org/base", shapes, given_scales)))
    refuse_variants(config, "x")
    read = Scaling(clean_config(config, "x"), "x")
    for name in names:
        assert read.rank(name) == shapes[name].rank
        assert read.scale(name) == pytest.approx(given_scales[name], rel=1e-12)


def test_an_ordinary_adapter_is_written_without_patterns():
    shapes = {f"layers.{i}.q": ModuleShape(rank=8, d_in=4, d_out=4) for i in range(3)}
    config = written_config(
        clean_config(PLAIN | {"use_rslora": True}, "x"), None, shapes, dict.fromkeys(shapes, 16 / 8)
    )
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (8, 16, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["init_lora_weights"] is True
