from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from adapterbank.adapters import LoraAdapter, LoraFactors
from adapterbank.errors import AdapterError
from adapterbank.shira.delta import SparseDelta
from adapterbank.shira.fusion import fuse
from tiny_models import gpt2


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_what_is_kept_are_the_largest_entries_and_their_share():
    update = drawn(30, 20)
    delta, kept = SparseDelta.from_dense({"a.weight": update}, 0.1, base="org/base")
    dense = delta.updates["a.weight"].dense()
    assert torch.equal(dense[dense != 0], update[dense != 0])
    assert dense[dense != 0].abs().min() >= update[dense == 0].abs().max()
    # what is left out is what is lost
    lost = float((update - dense).square().sum() / update.square().sum())
    assert kept["a.weight"] == pytest.approx(1 - lost, abs=1e-6)
    whole, all_of_it = SparseDelta.from_dense({"a.weight": update}, 1.0)
    assert torch.equal(whole.updates["a.weight"].dense(), update) and all_of_it["a.weight"] == 1.0
    assert SparseDelta.from_dense({"a.weight": torch.zeros(3, 3)}, 0.5)[1] == {"a.weight": 1.0}


def test_a_lora_comes_with_its_head_and_goes_back_exactly_at_full_rank():
    factors = {"body.q": LoraFactors(A=drawn(4, 20), B=drawn(30, 4, seed=1), scale=0.5)}
    lora = LoraAdapter.from_factors(
        "law", factors, base="org/base", config={"task_type": "SEQ_CLS"}, extras={"score.weight": drawn(2, 3)}
    )
    delta, kept = SparseDelta.from_lora(lora, 1.0)
    assert kept == {"body.q.weight": pytest.approx(1.0)}
    assert (delta.name, delta.base, delta.config["task_type"]) == ("law", "org/base", "SEQ_CLS")
    back, errors = delta.to_lora(4)
    assert errors["body.q.weight"] < 1e-5
    torch.testing.assert_close(back.factors("body.q").update(), factors["body.q"].update(), rtol=1e-4, atol=1e-4)
    assert torch.equal(back.extra("score.weight"), lora.extra("score.weight"))


@pytest.mark.parametrize("r", [1, 5, 20])
def test_the_nearest_lora_loses_what_eckart_and_young_say(r):
    delta, _ = SparseDelta.from_dense({"a.weight": drawn(30, 20)}, 0.2)
    lora, errors = delta.to_lora(r)
    dense = delta.updates["a.weight"].dense()
    singular = torch.linalg.svdvals(dense)
    found = dense - lora.factors("a").update()
    torch.testing.assert_close(found.square().sum(), singular[r:].square().sum(), rtol=1e-3, atol=1e-3)
    if r < 20:
        torch.testing.assert_close(torch.linalg.matrix_norm(found, ord=2), singular[r], rtol=1e-3, atol=1e-4)
    assert errors["a.weight"] == pytest.approx(float(found.norm() / dense.norm()), abs=1e-3)


def test_gpt_2_s_layers_are_stored_the_other_way_round(tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["c_attn", "c_proj"], init_lora_weights=False, fan_in_fan_out=True)
    tuned = get_peft_model(gpt2(), config)
    tuned.save_pretrained(tmp_path / "lora")
    delta, _ = SparseDelta.from_lora(LoraAdapter.load(tmp_path / "lora"), 1.0)
    ids, model = torch.arange(8)[None], gpt2().eval()
    delta.apply_(model)
    expected = tuned.eval()(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-3, atol=1e-4)
    delta.to_lora(2)[0].save(tmp_path / "back")
    back = PeftModel.from_pretrained(gpt2(), tmp_path / "back").eval()
    torch.testing.assert_close(back(ids).logits, expected, rtol=1e-3, atol=1e-4)
    one = fuse({"one": delta})  # still says how its layers are stored
    torch.testing.assert_close(one.to_lora(2)[0].factors("transformer.h.0.attn.c_attn").update(),
                               one.updates["transformer.h.0.attn.c_attn.weight"].dense().T)  # fmt: skip
    unsaid, _ = replace(delta, config={}).to_lora(2, fan_in_fan_out=True)
    name = next(iter(unsaid.modules))
    torch.testing.assert_close(unsaid.factors(name).update(), delta.updates[f"{name}.weight"].dense().T)


def test_sparse_updates_have_full_rank():
    delta, _ = SparseDelta.from_dense({"a.weight": drawn(60, 60)}, 0.2)
    assert int(torch.linalg.matrix_rank(delta.updates["a.weight"].dense())) == 60


def test_an_impossible_rank_is_refused():
    delta, _ = SparseDelta.from_dense({"a.weight": drawn(3, 4)}, 0.5)
    with pytest.raises(AdapterError, match=r"r=4 is no rank of a\.weight, which is \(3, 4\)"):
        delta.to_lora(4)
    assert isinstance(delta, SparseDelta)
