"""Against real PEFT on tiny random models: what it merges, what it loads, what it refuses."""

import copy
import json
import math

import pytest
import torch

from adapterbank.adapters import LoraAdapter
from adapterbank.errors import AdapterError, UnknownNameError

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    # PEFT 0.21 asks transformers 5.23 for an attribute that was renamed there
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # PEFT takes the vectors of lora_bias and the modules that AdaLoRA cut to rank 0 for shards
    pytest.mark.filterwarnings("ignore:Adapter .* LoRA tensor.s. have invalid shape"),
]

SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 60}


def bert(**kwargs):
    config = transformers.BertConfig(**SIZES, max_position_embeddings=16, num_labels=3)
    return transformers.BertForSequenceClassification(config)


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2))


def gpt2():
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=60, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


LLAMA = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
BERT = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
ADA = {"peft_type": "ADALORA", "total_step": 10, "init_r": 6, "target_r": 3, "lora_alpha": 12}
CASES = {
    "plain": (llama, LLAMA),
    "rslora": (llama, LLAMA | {"use_rslora": True, "r": 6}),
    "patterns": (
        llama,
        LLAMA
        | {"rank_pattern": {"q_proj": 2, r"layers\.1\..*v_proj": 3}, "alpha_pattern": {"layers.0.self_attn.v_proj": 5}},
    ),
    "patterns and rslora": (
        llama,
        LLAMA | {"rank_pattern": {"^model.layers.0.self_attn.q_proj": 2}, "use_rslora": True},
    ),
    "regex": (llama, LLAMA | {"target_modules": r".*\.(q|k)_proj"}),
    "all-linear": (llama, LLAMA | {"target_modules": "all-linear"}),
    "one layer": (llama, LLAMA | {"layers_to_transform": [1]}),
    "mica": (llama, LLAMA | {"init_lora_weights": "mica"}),
    "head": (bert, BERT),
    "head and more": (bert, BERT | {"modules_to_save": ["classifier", "pooler"]}),
    "lora_bias": (bert, BERT | {"lora_bias": True, "use_rslora": True, "rank_pattern": {"query": 3}}),
    "bias lora_only": (bert, BERT | {"bias": "lora_only"}),
    "bias all": (bert, BERT | {"bias": "all"}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj"], "task_type": "CAUSAL_LM", "fan_in_fan_out": True}),
    "adalora": (bert, BERT | ADA),
    "adalora without alpha": (bert, BERT | ADA | {"lora_alpha": 0}),
}


@pytest.fixture(params=CASES)
def trained(request):
    """A base model, and the same with an adapter whose every trained value is random."""
    make, fields = CASES[request.param]
    torch.manual_seed(len(request.param))
    base = make().eval()
    fields = {"r": 4, "lora_alpha": 8} | fields
    kind = peft.AdaLoraConfig if fields.pop("peft_type", "") == "ADALORA" else peft.LoraConfig
    if kind is peft.AdaLoraConfig:
        fields.pop("r")
    model = peft.get_peft_model(copy.deepcopy(base), kind(**fields)).eval()
    if kind is peft.AdaLoraConfig:
        # a budget as its allocator leaves it: every module keeps other directions, one keeps none but the first
        masks = {n.replace("base_model.model.", ""): n for n, _ in model.named_parameters() if "lora_E" in n}
        model.peft_config["default"].rank_pattern = {
            name: [bool((i + j) % 3) for i in range(6)] if j else [True] + [False] * 5 for j, name in enumerate(masks)
        }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
            mask = getattr(model.peft_config["default"], "rank_pattern", None) or {}
            cut = mask.get(name.replace("base_model.model.", ""))
            if "lora_E" in name and cut:
                parameter[~torch.tensor(cut)] = 0
    return base, model


def logits(model):
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        return model(input_ids=ids).logits


def merged_change(model):
    """What PEFT adds to each weight, (d_out, d_in) whatever way the layer stores it."""
    changes = {}
    for name, layer in model.base_model.model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            before = layer.get_base_layer().weight.detach().clone()
            if getattr(layer, "lora_bias", {}).get("default"):
                changes[name] = layer.get_delta_weight("default").detach()
                continue
            layer.merge()
            change = layer.get_base_layer().weight.detach() - before
            layer.unmerge()
            changes[name] = change.T if layer.fan_in_fan_out else change
    return changes


def close(a, b):
    torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def test_our_update_is_what_peft_merges(trained, tmp_path):
    _, model = trained
    model.save_pretrained(tmp_path / "law")
    adapter = LoraAdapter.load(tmp_path / "law")
    changes = merged_change(model)
    assert list(adapter.modules) == sorted(changes)
    for module, change in changes.items():
        factors = adapter.factors(module)
        assert (factors.rank, factors.d_in, factors.d_out) == tuple(vars(adapter.modules[module]).values())
        close(factors.update(), change)


def test_what_we_save_stock_peft_loads_with_the_same_outputs(trained, tmp_path):
    base, model = trained
    model.save_pretrained(tmp_path / "law")
    LoraAdapter.load(tmp_path / "law").save(tmp_path / "again")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again")
    assert not (logits(model) - logits(base)).abs().max() < 0.01
    close(logits(loaded), logits(model))


def test_keys_stay_the_same(trained, tmp_path):
    _, model = trained
    model.save_pretrained(tmp_path / "law")
    adapter = LoraAdapter.load(tmp_path / "law")
    adapter.save(tmp_path / "again")
    again = LoraAdapter.load(tmp_path / "again")
    assert set(again.modules) == set(adapter.modules)
    assert again.extra_names == adapter.extra_names
    for name in adapter.extra_names:
        assert torch.equal(again.extra(name), adapter.extra(name))
    for module, scale in adapter.scales.items():
        assert math.isclose(again.scales[module], scale, rel_tol=1e-12)


def test_to_peft_needs_no_files(trained, tmp_path):
    base, model = trained
    model.save_pretrained(tmp_path / "v1.0")
    adapter = LoraAdapter.load(tmp_path / "v1.0")
    live = adapter.to_peft(copy.deepcopy(base))
    close(logits(live), logits(model))
    assert live.active_adapters == ["v1_0"]
    assert not live.training
    assert not any(p.requires_grad for n, p in live.named_parameters() if "lora_" in n)


def test_from_peft_gives_what_saving_would(trained, tmp_path):
    _, model = trained
    model.save_pretrained(tmp_path / "law")
    stored, live = LoraAdapter.load(tmp_path / "law"), LoraAdapter.from_peft(model, name="law")
    assert live.modules == stored.modules
    assert live.scales == stored.scales
    assert live.extra_names == stored.extra_names
    for module in live.modules:
        assert torch.equal(live.factors(module).update(), stored.factors(module).update())


def test_from_peft_is_a_snapshot():
    model = peft.get_peft_model(llama(), peft.LoraConfig(**LLAMA, init_lora_weights=False))
    adapter = LoraAdapter.from_peft(model)
    before = adapter.factors("model.layers.0.self_attn.q_proj").A
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(adapter.factors("model.layers.0.self_attn.q_proj").A, before)
    with pytest.raises(UnknownNameError, match="the model has no adapter 'law'; it has default"):
        LoraAdapter.from_peft(model, "law")


def test_a_second_adapter_joins_and_takes_over(tmp_path):
    base = bert().eval()
    adapters = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**BERT, init_lora_weights=False))
        torch.nn.init.normal_(model.base_model.model.classifier.modules_to_save["default"].weight)
        adapters.append((LoraAdapter.from_peft(model, name=f"a{seed}"), logits(model.eval())))
    live = copy.deepcopy(base)
    for adapter, _ in adapters:
        live = adapter.to_peft(live)
        assert live.active_adapters == [adapter.name]
    for adapter, expected in reversed(adapters):
        live.set_adapter(adapter.name)
        close(logits(live), expected)
    with pytest.raises(AdapterError, match="has an adapter 'a0' already; pass another adapter_name="):
        adapters[0][0].to_peft(live)
    close(logits(adapters[0][0].to_peft(live, "third")), adapters[0][1])


def test_an_adapter_fits_its_base_without_the_head_and_says_so():
    whole = bert().eval()
    model = peft.get_peft_model(copy.deepcopy(whole), peft.LoraConfig(**BERT, init_lora_weights=False)).eval()
    adapter = LoraAdapter.from_peft(model)
    with pytest.warns(UserWarning) as warned:
        live = adapter.to_peft(copy.deepcopy(whole.bert))
    text = " ".join(str(warning.message) for warning in warned)
    assert "bert.encoder.layer.0.attention.self.query goes to the model's encoder.layer.0.attention.self.query" in text
    assert "no place for classifier.bias, classifier.weight; left out" in text
    ids = torch.arange(20).reshape(2, 10)
    close(live(input_ids=ids).pooler_output, model.base_model.model.bert(input_ids=ids).pooler_output)


def test_another_base_is_refused_by_module_and_another_id_only_warned_about():
    model = peft.get_peft_model(llama(), peft.LoraConfig(**LLAMA, init_lora_weights=False))
    adapter = LoraAdapter.from_peft(model, name="law")
    with pytest.raises(
        AdapterError, match=r"adapter 'law', model.layers.0.self_attn.q_proj: the model \(Bert.*no such module"
    ):
        adapter.to_peft(bert())
    narrow = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | {"hidden_size": 16}))
    with pytest.raises(AdapterError, match=r"the model's layer maps 16 to 16 features, the adapter 32 to 32"):
        adapter.to_peft(narrow)
    factors = {module: adapter.factors(module) for module in adapter.modules}
    named = LoraAdapter.from_factors("law", factors, base="org/one", config=adapter.config)
    other = llama()
    other.name_or_path = "/somewhere/two"
    with pytest.warns(UserWarning, match="adapter 'law' was trained on org/one, this model is two"):
        named.to_peft(other)


def test_a_broken_adapter_leaves_the_model_as_it_was():
    model = llama()
    names = [name for name, _ in model.named_modules()]
    adapter = LoraAdapter.from_peft(peft.get_peft_model(llama(), peft.LoraConfig(**LLAMA, init_lora_weights=False)))
    factors = {module: adapter.factors(module) for module in adapter.modules}
    next(iter(factors.values())).B[0, 0] = math.nan
    with pytest.raises(AdapterError, match="not finite"):
        LoraAdapter.from_factors("law", factors, config=adapter.config).to_peft(model)
    assert [name for name, _ in model.named_modules()] == names


def test_what_peft_refuses_is_said_in_our_words():
    live = peft.get_peft_model(llama(), peft.LoraConfig(**LLAMA, init_lora_weights=False))
    adapter = LoraAdapter.from_peft(live, name="law")
    other = peft.get_peft_model(llama(), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(AdapterError, match="adapter 'law': PEFT can't add it to this model: Cannot combine"):
        adapter.to_peft(other)


def test_lossy_variants_are_refused_from_live_models_too():
    model = peft.get_peft_model(llama(), peft.LoraConfig(**LLAMA, use_dora=True))
    with pytest.raises(AdapterError, match="it is a DoRA"):
        LoraAdapter.from_peft(model)
    model = peft.get_peft_model(llama(), peft.LoraConfig(**LLAMA, init_lora_weights="olora"))
    with pytest.raises(AdapterError, match="path_initial_model_for_weight_conversion"):
        LoraAdapter.from_peft(model)
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["embed_tokens", "q_proj"]))
    with pytest.raises(AdapterError, match=r"model\.embed_tokens: it adapts an embedding"):
        LoraAdapter.from_peft(model)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_pissa_goes_in_the_way_the_refusal_says(tmp_path):
    torch.manual_seed(0)
    base = llama().eval()
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**LLAMA, r=4, init_lora_weights="pissa")).eval()
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "raw")
    with pytest.raises(AdapterError, match="init_lora_weights='pissa' changed the base weights"):
        LoraAdapter.load(tmp_path / "raw")
    expected = logits(model)
    model.save_pretrained(tmp_path / "law", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    adapter = LoraAdapter.load(tmp_path / "law")
    assert {shape.rank for shape in adapter.modules.values()} == {8}
    torch.testing.assert_close(logits(adapter.to_peft(base)), expected, rtol=1e-4, atol=1e-5)


def test_adalora_that_cut_a_module_to_nothing_loads_as_a_zero_update(tmp_path):
    model = peft.get_peft_model(
        bert(), peft.AdaLoraConfig(**{k: v for k, v in (BERT | ADA).items() if k != "peft_type"})
    )
    name = "bert.encoder.layer.0.attention.self.query"
    model.peft_config["default"].rank_pattern = {f"{name}.lora_E.default": [False] * 6}
    model.save_pretrained(tmp_path / "law")
    adapter = LoraAdapter.load(tmp_path / "law")
    assert adapter.modules[name].rank == 1
    assert adapter.factors(name).update().abs().max() == 0
    adapter.save(tmp_path / "again")
    peft.PeftModel.from_pretrained(bert(), tmp_path / "again")


def test_without_peft_the_error_names_the_extra(monkeypatch, adapter_dirs):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(AdapterError, match=r"pip install 'adapterbank\[peft\]'"):
        LoraAdapter.load(adapter_dirs[0]).to_peft(torch.nn.Linear(2, 2))


def test_a_saved_config_has_no_private_keys(trained, tmp_path):
    _, model = trained
    adapter = LoraAdapter.from_peft(model)
    adapter.save(tmp_path / "law")
    written = json.loads((tmp_path / "law" / "adapter_config.json").read_text())
    assert set(written) <= {field for field in peft.LoraConfig.__dataclass_fields__}
    assert written["peft_type"] == "LORA"
