"""Banks that kept little: layers with fewer directions than the rank, or none."""

import torch
from peft import get_peft_model

from adapterbank.adapters import LoraAdapter, LoraFactors
from adapterbank.bank import Bank
from adapterbank.tuner import augment, export_lora, load
from adapterbank.tuner.live import adapter_layers
from tiny_models import TARGETS, adapters_for, eigen, llama, perturb


def thin_bank():
    """Members that change one layer in one direction, and another one not at all."""
    full = adapters_for(llama(), TARGETS["llama"], n=2)
    first, second, *rest = sorted(full[0].modules)
    found = []
    for adapter in full:
        factors = {m: adapter.factors(m) for m in rest}
        one, none = adapter.factors(first), adapter.factors(second)
        factors[first] = LoraFactors(A=one.A[:1].expand(4, -1), B=one.B[:, :1].expand(-1, 4), scale=1.0)
        factors[second] = LoraFactors(A=none.A, B=torch.zeros_like(none.B), scale=1.0)
        found.append(LoraAdapter.from_factors(adapter.name, factors, base="tiny/base"))
    return Bank.fit(found, max_error=0.01), first, second


def test_layers_with_few_directions_or_none_are_trained_as_far_as_they_go(inputs, tmp_path):
    bank, first, second = thin_bank()
    bank.save(tmp_path / "bank")
    model = get_peft_model(llama(), eigen(bank, k=None, task_type="CAUSAL_LM"))
    layers = adapter_layers(model)
    assert max(layers[first].basis_of["default"].k) < 4
    assert layers[second].basis_of["default"].k == (0, 0)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    torch.optim.AdamW(model.parameters()).step()
    perturb(model).eval()
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path / "task")
    loaded = load(llama(), tmp_path / "task", bank=tmp_path / "bank")
    torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=0, atol=0)
    bank.add(tmp_path / "task")
    lora, member = export_lora(model), bank.reconstruct("task")
    for module in member.modules:
        torch.testing.assert_close(member.factors(module).update(), lora.factors(module).update())


def test_gradient_directions_give_such_layers_something_to_learn(inputs):
    bank, _, second = thin_bank()
    model = get_peft_model(llama(), eigen(bank, k=None, task_type="CAUSAL_LM"))
    batch = inputs | {"labels": inputs["input_ids"]}
    augment(model, [batch], 3)
    model(**batch).loss.backward()
    coefficients = adapter_layers(model)[second].eig_coef_B["default"]
    assert coefficients.shape == (3, 4)
    assert coefficients.grad.abs().sum() > 0


def test_a_task_that_brings_its_basis_joins_with_such_layers_too(tmp_path):
    bank, _, second = thin_bank()
    bank.save(tmp_path / "bank")
    model = perturb(get_peft_model(llama(), eigen(bank, k=None, task_type="CAUSAL_LM", save_basis=True)))
    model.save_pretrained(tmp_path / "task")
    bank.add(tmp_path / "task")
    assert not bank.reconstruct("task").factors(second).update().any()
