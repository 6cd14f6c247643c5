"""The package as its users meet it."""

import subprocess
import sys

import torch
from peft import get_peft_model

import adapterbank
from adapterbank import SparseDelta, shira
from adapterbank.shira import ShiraTunerConfig, Switcher, fuse
from tiny_models import llama


def test_every_public_name_is_there():
    assert all(getattr(shira, name) is not None for name in shira.__all__)
    assert adapterbank.SparseDelta is shira.SparseDelta


def test_a_fresh_process_finds_the_method_by_its_config_alone():
    code = (
        "from adapterbank.shira import ShiraTunerConfig as C; import peft; print(C().peft_type in list(peft.PeftType))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_train_save_switch_and_fuse(tmp_path):
    ids = {"input_ids": torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(0))}
    for i, name in enumerate(("law", "news")):
        model = get_peft_model(llama(), ShiraTunerConfig(density=0.05, part=i, target_modules=["q_proj", "v_proj"]))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-1)
        for _ in range(3):
            model(**ids, labels=(ids["input_ids"] + i) % 50).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(tmp_path / "adapters" / name)
    plain = llama()
    expected = plain(**ids).logits
    switcher, seen = Switcher(plain, tmp_path / "adapters"), {}
    for name in switcher.names:
        with switcher.use(name):
            seen[name] = plain(**ids).logits
    assert not torch.allclose(seen["law"], seen["news"])
    switcher.restore()
    assert torch.equal(plain(**ids).logits, expected)
    both = fuse({name: SparseDelta.load(tmp_path / "adapters" / name) for name in switcher.names})
    assert both.density == 2 * SparseDelta.load(tmp_path / "adapters" / "law").density  # parts share nothing
    saved = both.apply_(plain)
    assert not torch.allclose(plain(**ids).logits, expected)
    both.restore_(plain, saved)
    assert torch.equal(plain(**ids).logits, expected)
