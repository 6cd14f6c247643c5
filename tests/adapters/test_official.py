import json

import pytest
import torch
from safetensors.torch import save_file

from adapterbank.adapters import LoraAdapter
from adapterbank.bank import Bank
from adapterbank.errors import AdapterError

MODULE = "base_model.model.roberta.encoder.layer.0.attention.self.query"


def tensors(seed=0, adapter=""):
    seeded = torch.Generator().manual_seed(seed)
    sizes = {"eigenlora_A.components": (20, 6), "eigenlora_A.loadings": (6, 3),
             "eigenlora_B.components": (16, 6), "eigenlora_B.loadings": (6, 3)}  # fmt: skip
    return {
        f"{MODULE}.{name.replace('.', f'{adapter}.')}": torch.randn(size, generator=seeded)
        for name, size in sizes.items()
    }


@pytest.fixture
def save(tmp_path):
    def write(values, name="official"):
        (tmp_path / name).mkdir()
        config = {"peft_type": "EIGENLORA", "r": 3, "task_type": "SEQ_CLS", "base_model_name_or_path": "roberta-base"}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
        save_file(values, tmp_path / name / "adapter_model.safetensors")
        return tmp_path / name

    return write


@pytest.mark.parametrize("adapter", ["", ".default"])
def test_components_and_loadings_become_a_lora(save, adapter):
    values = tensors(adapter=adapter)
    head = torch.randn(2, 16)
    adapter_ = LoraAdapter.load(save(values | {"base_model.model.classifier.weight": head}))
    E_A, C_A, E_B, C_B = values.values()
    factors = adapter_.factors(MODULE.removeprefix("base_model.model."))
    torch.testing.assert_close(factors.update(), (E_B @ C_B) @ (E_A @ C_A).T)
    assert (adapter_.rank, adapter_.base, adapter_.task_type) == (3, "roberta-base", "SEQ_CLS")
    assert torch.equal(adapter_.extra("classifier.weight"), head)


def test_a_bank_is_fitted_on_them(save):
    bank = Bank.fit([save(tensors(i), f"a{i}") for i in range(3)], max_error=0.05)
    assert max(bank.errors().values()) <= 0.05


def test_missing_parts_and_wrong_shapes_are_named(save):
    values = tensors()
    lacking = {key: value for key, value in values.items() if "A.loadings" not in key}
    with pytest.raises(AdapterError, match=r"query: eigenlora_A\.loadings is missing"):
        LoraAdapter.load(save(lacking, "one"))
    key = f"{MODULE}.eigenlora_B.loadings"
    with pytest.raises(AdapterError, match=r"components of B are \(16, 6\), loadings \(5, 3\)"):
        LoraAdapter.load(save(values | {key: torch.ones(5, 3)}, "two"))
    with pytest.raises(AdapterError, match=r"holds no eigenlora_A\.components"):
        LoraAdapter.load(save({"base_model.model.classifier.weight": torch.ones(2)}, "three"))
