"""Trained parameters, counted exactly (spec.md 2.9; the papers' tables), and the bytes of a task's file."""

import pytest
import torch
from peft import LoraConfig, VeraConfig, get_peft_model
from torch import nn

from adapterbank.adapters import LoraAdapter
from adapterbank.bank import Bank
from tiny_models import eigen, factors


def stack(layers, names, d):
    """``layers`` blocks with one square linear layer each of ``names``."""
    blocks = nn.ModuleList(nn.ModuleDict({name: nn.Linear(d, d, bias=False) for name in names}) for _ in range(layers))
    return nn.ModuleDict({"layers": blocks})


def bank_of(model, d, *, n, rank, **options):
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    adapters = [
        LoraAdapter.from_factors(f"a{i}", {m: factors(d, d, rank, 999 * i + j) for j, m in enumerate(names)}, base="b")
        for i in range(n)
    ]
    return Bank.fit(adapters, **options)


def trained(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.fixture(scope="module")
def roberta_bank():
    return bank_of(stack(12, ("query", "value"), 768), 768, n=2, rank=16, k=32)


def roberta():
    return stack(12, ("query", "value"), 768)


def test_roberta_base(roberta_bank):
    assert trained(get_peft_model(roberta(), LoraConfig(r=32, target_modules=["query", "value"]))) == 1_179_648
    assert trained(get_peft_model(roberta(), VeraConfig(r=256, target_modules=["query", "value"]))) == 24_576
    assert trained(get_peft_model(roberta(), eigen(roberta_bank, r=8, k=32))) == 12_288


def test_other_ways_to_train_roberta_base(roberta_bank):
    def count(**fields):
        return trained(get_peft_model(roberta(), eigen(roberta_bank, r=8, k=32, **fields)))

    assert count(train="components") == 1_191_936
    assert count(train="core") == 24 * 32 * 32
    assert count(train="head") == 0
    assert count(free_rank=1) == 12_288 + 24 * 2 * 768
    assert count(edge_layers=1) == 12_288 + 4 * 2 * 32 * 768
    assert count(random_directions=16) == 24 * 8 * 2 * 48
    assert count(base_directions=8) == 24 * 8 * 2 * 40
    assert count(gradient_directions=16) == 24 * 8 * 2 * 48


def test_vit_base():
    def vit():
        return stack(12, ("q_proj", "v_proj"), 768)

    lora = {"target_modules": ["q_proj", "v_proj"]}
    assert trained(get_peft_model(vit(), LoraConfig(r=4, **lora))) == 147_456
    assert trained(get_peft_model(vit(), LoraConfig(r=1, **lora))) == 36_864
    assert trained(get_peft_model(vit(), VeraConfig(r=2, **lora))) == 18_480
    bank = bank_of(vit(), 768, n=2, rank=2, k=2)
    assert trained(get_peft_model(vit(), eigen(bank, r=1, k=2))) == 96


def test_flan_t5_large():
    def t5():  # 24 + 2 * 24 attentions, q and v; without weights, which nobody counts
        with torch.device("meta"):
            return stack(72, ("q", "v"), 1024)

    lora = {"target_modules": ["q", "v"]}
    assert trained(get_peft_model(t5(), LoraConfig(r=16, **lora))) == 4_718_592
    assert trained(get_peft_model(t5(), LoraConfig(r=1, **lora))) == 294_912
    bank = bank_of(t5(), 1024, n=2, rank=16, k=32)
    assert trained(get_peft_model(t5(), eigen(bank, r=16, k=32))) == 147_456


def test_the_flat_variant_has_k_numbers_a_factor():
    # 2 K a module: FLAN-T5-large with K=8 and its 144 modules has 2,304
    bank = bank_of(stack(3, ("q", "v"), 32), 32, n=9, rank=4, method="flat", k=8, quantize=False)
    assert trained(get_peft_model(stack(3, ("q", "v"), 32), eigen(bank, r=4, k=8))) == 2_304 * 6 // 144


def test_a_task_of_roberta_base_takes_56_kilobytes(roberta_bank, tmp_path):
    # with the names that RobertaForSequenceClassification's layers have
    model = nn.ModuleDict({"roberta": nn.ModuleDict({"encoder": nn.ModuleDict({"layer": nn.ModuleList()})})})
    for block in roberta()["layers"]:
        inside = nn.ModuleDict({"attention": nn.ModuleDict({"self": block})})
        model["roberta"]["encoder"]["layer"].append(inside)
    tuned = get_peft_model(model, eigen(bank_of(model, 768, n=2, rank=16, k=32), r=8, k=32))
    tuned.save_pretrained(tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert size <= 12_288 * 4 + 48 * 160
