"""Quantised base layers are called, never read, except by a merge and by directions of the base weight."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from adapterbank.bank import Bank
from tiny_models import TARGETS, adapters_for, eigen, llama, perturb


def torchao():
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def bitsandbytes():
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


@pytest.fixture(params=[torchao, bitsandbytes])
def make(request, tmp_path):
    """A function that loads the quantised model."""
    llama().save_pretrained(tmp_path)
    config = request.param()
    return lambda: AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config).eval()


@pytest.fixture
def bank():
    return Bank.fit(adapters_for(llama(), TARGETS["llama"]), max_error=0.1)


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("fields", [{}, {"base_directions": 2}], ids=["plain", "base weight"])
def test_a_quantised_base_is_trained_on(make, bank, inputs, fields):
    expected = logits(make(), inputs)
    model = get_peft_model(make(), eigen(bank, task_type="CAUSAL_LM", **fields))
    torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=0)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore:Merge lora module to 8-bit")
def test_a_merge_is_as_coarse_as_the_base(make, bank, inputs):
    model = perturb(get_peft_model(make(), eigen(bank, task_type="CAUSAL_LM"))).eval()
    before = logits(model, inputs)
    model.merge_adapter()
    lost = (logits(model, inputs) - before).norm() / before.norm()
    lora = get_peft_model(make(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    expected = logits(lora, inputs)
    lora.merge_adapter()
    assert lost < 3 * (logits(lora, inputs) - expected).norm() / expected.norm()
