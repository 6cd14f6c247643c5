import pytest
import torch
from peft import get_peft_model

from adapterbank.errors import AdapterBankError
from adapterbank.tuner import optimizer_groups
from tiny_models import bert, eigen, llama


def names(model, groups):
    known = {id(p): name for name, p in model.named_parameters()}
    return {group["name"]: [known[id(p)] for p in group["params"]] for group in groups}


def test_every_trained_parameter_is_in_one_group(bank_dirs):
    model = get_peft_model(bert(), eigen(bank_dirs["bert"], task_type="SEQ_CLS", free_rank=1))
    groups = optimizer_groups(model, lr=0.1, head_lr=0.2, component_lr=0.3, weight_decay=0.01, loraplus_ratio=4.0)
    found = names(model, groups)
    grouped = sorted(name for group in found.values() for name in group)
    assert grouped == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    assert {group["name"]: group["lr"] for group in groups} == {
        "coef_A": 0.1, "coef_B": 0.4, "components": 0.3, "head": 0.2, "head, no decay": 0.2,
    }  # fmt: skip
    assert all(".eig_coef_A." in name for name in found["coef_A"])
    assert all(".eig_free_" in name for name in found["components"])
    assert found["head, no decay"] == ["base_model.model.classifier.modules_to_save.default.bias"]
    assert next(g for g in groups if g["name"] == "head, no decay")["weight_decay"] == 0


def test_torch_takes_the_groups_as_they_are(bank_dir):
    torch.optim.SGD(optimizer_groups(get_peft_model(llama(), eigen(bank_dir))))


def test_nothing_to_train_is_an_error(bank_dir):
    model = get_peft_model(llama(), eigen(bank_dir))
    model.set_adapter("default", inference_mode=True)
    with pytest.raises(AdapterBankError, match="no parameter asks for gradients"):
        optimizer_groups(model)
