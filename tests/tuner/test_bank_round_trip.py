"""A task that was trained in a bank joins it: train, save, add, save the bank, load it, and nothing has changed."""

import pytest
import torch
from peft import get_peft_model

from adapterbank.bank import Bank
from adapterbank.tuner import EigenLoraConfig, export_lora, optimizer_groups
from tiny_models import MODELS


def trained(model, inputs, directory, **fields):
    """A model after two steps, its task saved."""
    torch.manual_seed(0)
    tuned = get_peft_model(model, EigenLoraConfig(**{"r": 3, "k": 12, "task_type": "CAUSAL_LM"} | fields))
    optimizer = torch.optim.AdamW(optimizer_groups(tuned))
    for _ in range(2):
        tuned(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned.save_pretrained(directory)
    return tuned


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"train": "core", "lora_alpha": 1.5}, {"lora_alpha": 6.0}, {"save_basis": True}, {"random_directions": 3},
        {"k": 0, "random_directions": 5}, {"save_basis": True, "random_directions": 2},
    ],
    ids=str,
)  # fmt: skip
def test_a_trained_task_joins_its_bank_to_the_bit(bank_dir, inputs, tmp_path, fields):
    tuned = trained(MODELS["llama"](), inputs, tmp_path / "task", bank=bank_dir, **fields)
    expected, bank = export_lora(tuned), Bank.load(bank_dir)
    bank.add(tmp_path / "task")
    bank.save(tmp_path / "bank")
    restored = Bank.load(tmp_path / "bank").reconstruct("task")
    assert bank["task"].error == 0
    assert dict(restored.modules) == dict(expected.modules)
    for module in expected.modules:
        ours, theirs = restored.factors(module), expected.factors(module)
        assert theirs.B.any()
        assert torch.equal(ours.A, theirs.A)
        assert torch.equal(ours.scale * ours.B, theirs.scale * theirs.B)


@pytest.mark.parametrize("fields", [{"free_rank": 2}, {"train": "components"}, {"edge_layers": 1}], ids=str)
def test_a_task_with_parts_of_its_own_joins_within_the_bank_s_error(bank_dir, inputs, tmp_path, fields):
    tuned = trained(MODELS["llama"](), inputs, tmp_path / "task", bank=bank_dir, **fields)
    expected, bank = export_lora(tuned, name="task"), Bank.load(bank_dir)
    bank.add(tmp_path / "task")
    assert bank["task"].task is None
    assert bank.verify([expected])["task"] == pytest.approx(bank["task"].error, rel=1e-3)
    assert bank["task"].error <= 0.1
