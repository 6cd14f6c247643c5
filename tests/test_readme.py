"""The README's Python runs as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adapterbank.bank import Bank
from families import make_family
from tiny_models import adapters_for, bert, llama

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_python_example_runs(page, tmp_path):
    block = re.search(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    made = make_family(tmp_path, n=3, rank=8, hidden=256, layers=2, shared_rank=16)
    (tmp_path / "adapters").mkdir()
    for directory, name in zip(made, ("law", "news", "sports"), strict=True):
        Path(directory).rename(tmp_path / "adapters" / name)
    # a process of its own, without the tests' shape checks: they refuse the int that a reader writes for a float
    done = subprocess.run([sys.executable, "-c", block[1]], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "restored" / "law" / "adapter_model.safetensors").is_file()


def block_with(words, page="README.md"):
    """The page's Python block that has these words."""
    (found,) = (
        b for b in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL) if words in b
    )
    return found


@pytest.fixture
def batch():
    return {"input_ids": torch.randint(3, 50, (3, 6)), "attention_mask": torch.ones(3, 6, dtype=torch.long)}


@pytest.fixture
def bank(tmp_path, monkeypatch):
    """Of three members, where the pages look for it."""
    monkeypatch.chdir(tmp_path)

    def made(model, targets):
        members = adapters_for(model, targets, n=3, rank=8)
        names = dict(zip(("law", "news", "sports"), members, strict=True))
        Bank.fit(names, k=16).save("bank")

    return made


def test_the_training_example_runs(bank, batch):
    base = bert()
    bank(base, ("query", "value"))
    batches = [{**batch, "labels": torch.tensor([0, 1, 2])}]
    names = {"base": base, "train_dataloader": batches, "torch": torch}
    exec(block_with("augment(model"), names)
    names["optimizer"].step()
    assert {group["name"] for group in names["optimizer"].param_groups} >= {"coef_A", "coef_B", "head"}


def test_the_serving_example_runs(bank, batch):
    model = llama()
    bank(model, ("q_proj", "v_proj"))
    names = {"model": model, "batch": {**batch, "max_new_tokens": 2}}
    exec(block_with("AdapterEngine(model"), names)
    assert names["engine"].names == ["law", "news", "sports"]


def test_the_sparse_example_leaves_the_base_model_as_it_was(tmp_path, monkeypatch, batch):
    from peft import get_peft_model

    from adapterbank.shira import ShiraTunerConfig

    monkeypatch.chdir(tmp_path)
    trained = get_peft_model(llama(), ShiraTunerConfig(density=0.01, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, parameter in trained.named_parameters():
        if "sparse_values" in name:
            torch.nn.init.ones_(parameter)
    trained.save_pretrained("sparse-adapters/law")
    names = {"base": llama(), "batch": batch, "get_peft_model": get_peft_model}
    exec(block_with("Switcher(base"), names)
    assert names["switcher"].active is None
    for key, value in llama().state_dict().items():
        assert torch.equal(names["base"].state_dict()[key], value)
