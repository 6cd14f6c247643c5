"""Adapters that bring their basis along, where the bank is not to be had."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from adapterbank.codec.rows import unpack_rows
from adapterbank.errors import BankError
from adapterbank.tuner import augment, load
from adapterbank.tuner.live import adapter_layers
from tiny_models import eigen, llama, perturb


@pytest.fixture
def save(bank_dir, tmp_path, monkeypatch):
    """Save a task with its basis, and go where no bank is."""

    def make(**fields):
        config = eigen(bank_dir, task_type="CAUSAL_LM", save_basis=True, **fields)
        model = perturb(get_peft_model(llama(), config)).eval()
        model.save_pretrained(tmp_path / "task")
        monkeypatch.chdir(tmp_path)
        return model, tmp_path / "task"

    return make


def test_edges_are_those_of_the_training(save, inputs):
    model, task = save(edge_layers=1, target_modules=[f"layers.{i}.self_attn.q_proj" for i in (0, 1)])
    torch.testing.assert_close(load(llama(), task)(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)


@pytest.mark.parametrize("lean", [False, True])
def test_the_basis_of_the_file_is_what_everything_else_uses(save, inputs, lean):
    model, task = save()
    loaded = PeftModel.from_pretrained(llama(), task, low_cpu_mem_usage=lean, is_trainable=True)
    for name, layer in adapter_layers(loaded).items():
        for found, expected in zip(layer.basis("default"), adapter_layers(model)[name].basis("default"), strict=True):
            assert torch.equal(found, expected)
    batch = inputs | {"labels": inputs["input_ids"]}
    augment(loaded, [batch], 2, bits=8)
    for layer in adapter_layers(loaded).values():
        V, _ = layer.basis("default")
        found = unpack_rows(layer.eig_gradient_in["default"], layer.in_features, 8)
        torch.testing.assert_close(found @ V.T, torch.zeros(2, len(V)), rtol=0, atol=0.02)


def test_the_file_holds_bases_of_its_own_layers_only(bank_dir, tmp_path):
    model = get_peft_model(llama(), eigen(bank_dir, save_basis=True, target_modules=["q_proj"]))
    model.add_adapter("wide", eigen(bank_dir, save_basis=True))
    model.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / "adapter_model.safetensors") if "v_proj" in name]


def test_directions_of_the_base_weight_need_that_weight(bank_dir, tmp_path, inputs):
    model = perturb(get_peft_model(llama(), eigen(bank_dir, task_type="CAUSAL_LM", base_directions=4))).eval()
    model.save_pretrained(tmp_path / "task")
    same = load(llama(), tmp_path / "task", bank=bank_dir)
    torch.testing.assert_close(same(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)
    assert load(llama().to(torch.bfloat16), tmp_path / "task", bank=bank_dir)
    coarse = llama()
    for parameter in coarse.parameters():
        step = parameter.data.abs().max() / 3
        parameter.data = (parameter.data / step).round() * step
    with pytest.raises(BankError, match="computed from other base weights"):
        load(coarse, tmp_path / "task", bank=bank_dir)
