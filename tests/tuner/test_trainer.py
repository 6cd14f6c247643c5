"""transformers' Trainer: resuming, reloading the best model, and components at the end."""

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from adapterbank.errors import AdapterBankError
from adapterbank.tuner import StagedComponents, load, optimizer_groups, train_components
from adapterbank.tuner.layer import EigenLoraLayer
from tiny_models import eigen, llama


@pytest.fixture
def data():
    seeded = torch.Generator().manual_seed(2)
    rows = torch.randint(3, 50, (16, 6), generator=seeded)
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(bank, out, data, *, callbacks=None, model=None, **options):
    torch.manual_seed(0)
    model = model or get_peft_model(llama(), eigen(bank, task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=6, per_device_train_batch_size=4, report_to=[], use_cpu=True, logging_steps=1,
        seed=3, disable_tqdm=True, **options,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(optimizer_groups(model))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)
    return Trainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=data, optimizers=(optimizer, schedule),
        callbacks=callbacks,
    )  # fmt: skip


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".eig_" in n}


def test_resuming_gives_the_weights_of_a_run_without_a_break(bank_dir, data, tmp_path):
    whole = trainer(bank_dir, tmp_path / "whole", data, save_steps=3)
    whole.train()
    other = trainer(bank_dir, tmp_path / "other", data, save_steps=100)
    other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name, value in weights(other.model).items():
        torch.testing.assert_close(value, weights(whole.model)[name], rtol=1e-5, atol=1e-6)


def test_the_best_model_comes_back_at_the_end(bank_dir, data, tmp_path):
    run = trainer(
        bank_dir, tmp_path, data, save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True
    )
    run.train()
    best = load(llama(), run.state.best_model_checkpoint, bank=bank_dir)
    for name, value in weights(best).items():
        assert torch.equal(value, weights(run.model)[name])


def test_base_weights_and_bases_stay_bit_for_bit(bank_dir, data, tmp_path):
    run = trainer(bank_dir, tmp_path, data, save_strategy="no")
    before = {n: t.clone() for n, t in run.model.named_parameters() if ".eig_" not in n}
    before |= {n: b.clone() for n, b in run.model.named_buffers()}
    run.train()
    after = dict(run.model.named_parameters()) | dict(run.model.named_buffers())
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_components_are_trained_in_the_last_share_of_the_steps(bank_dir, data, tmp_path):
    run = trainer(bank_dir, tmp_path, data, save_strategy="no", callbacks=[StagedComponents(0.5)])
    shared = [b.clone() for n, b in run.model.named_buffers() if ".shared_" in n]
    run.train()
    assert run.model.peft_config["default"].train == "components"
    for layer in run.model.modules():
        if isinstance(layer, EigenLoraLayer):
            own, bank = layer.eig_V["default"], layer.shared_V[layer.basis_of["default"].id]
            assert not torch.equal(own, bank)
            assert (own - bank).abs().max() < 0.1
    after = [b for n, b in run.model.named_buffers() if ".shared_" in n]
    assert all(torch.equal(a, b) for a, b in zip(shared, after, strict=True))
    run.model.save_pretrained(tmp_path / "task")
    loaded = load(llama(), tmp_path / "task", bank=bank_dir)
    for name, value in weights(loaded).items():
        assert torch.equal(value, weights(run.model)[name])


def test_own_components_change_nothing_by_themselves(bank_dir, inputs):
    model = get_peft_model(llama(), eigen(bank_dir, start="random")).eval()
    expected = model(**inputs).logits
    found = train_components(model)
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=0)
    assert all(p.requires_grad for p in found)
    assert len(train_components(model)) == len(found)


def test_what_would_mix_two_stages_is_refused(bank_dir, data, tmp_path):
    run = trainer(
        bank_dir, tmp_path, data, save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        callbacks=[StagedComponents(0.5)],
    )  # fmt: skip
    with pytest.raises(AdapterBankError, match="StagedComponents and load_best_model_at_end"):
        run.train()
    for train in ("core", "head"):
        with pytest.raises(AdapterBankError, match="train='coefficients'"):
            train_components(get_peft_model(llama(), eigen(bank_dir, train=train)))


def test_a_share_is_between_nothing_and_all():
    with pytest.raises(AdapterBankError, match=r"share=1\.0 is outside"):
        StagedComponents(1.0)
