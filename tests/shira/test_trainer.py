"""transformers' Trainer: resuming, the best model at the end, accumulation."""

from functools import partial

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from tiny_models import llama, sparse


@pytest.fixture
def data():
    seeded = torch.Generator().manual_seed(2)
    rows = torch.randint(3, 50, (16, 6), generator=seeded)
    return [{"input_ids": row, "labels": row} for row in rows]


@pytest.fixture(params=[0, 2], ids=["plain", "dora"])
def trainer(request, data):
    return partial(make_trainer, data=data, dora_rank=request.param)


def make_trainer(out, data, dora_rank, **options):
    torch.manual_seed(0)
    model = get_peft_model(llama(), sparse(task_type="CAUSAL_LM", dora_rank=dora_rank))
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=6, per_device_train_batch_size=4, report_to=[], use_cpu=True, logging_steps=1,
        learning_rate=1e-2, seed=3, disable_tqdm=True, **options,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)


def values(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "sparse_" in n}


def test_it_trains_and_the_base_stays_bit_for_bit(trainer, tmp_path):
    run = trainer(tmp_path, save_strategy="no", gradient_accumulation_steps=2)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters() if "sparse_" not in n}
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    after = dict(run.model.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(value.any() for value in values(run.model).values())


def test_resuming_gives_the_values_of_a_run_without_a_break(trainer, tmp_path):
    whole = trainer(tmp_path / "whole", save_steps=3)
    whole.train()
    other = trainer(tmp_path / "other", save_steps=100)
    other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name, value in values(other.model).items():
        torch.testing.assert_close(value, values(whole.model)[name], rtol=1e-5, atol=1e-6)


def test_the_best_model_comes_back_at_the_end(trainer, tmp_path):
    run = trainer(tmp_path, save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True)
    run.train()
    best = PeftModel.from_pretrained(llama(), run.state.best_model_checkpoint)
    for name, value in values(best).items():
        assert torch.equal(value, values(run.model)[name])
