from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from adapterbank.adapters import LoraAdapter
from adapterbank.bank import Bank
from adapterbank.demo import newtask
from adapterbank.demo.newtask import NewTask, train_new_task
from adapterbank.demo.train import TrainSettings, evaluate, read_meta, train_adapter
from adapterbank.tuner import load

# PEFT 0.21 still asks transformers 5 for a name that it renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SETTINGS = TrainSettings(task="colours", examples=40, test_examples=40, epochs=10, batch=8, lr=2e-2, r=2)


@pytest.fixture
def job(tiny, monkeypatch):
    """A new task for a bank of two adapters."""
    monkeypatch.setattr(newtask, "load_classifier", tiny.classifier)
    folders = [train_adapter(replace(SETTINGS, task=name, init_seed=i)) for i, name in enumerate("ab")]
    Bank.fit([LoraAdapter.load(path, name=f"a{i}") for i, path in enumerate(folders)], max_error=0.01).save(
        tiny.folder / "bank"
    )
    return NewTask(method="bank", bank=tiny.folder / "bank", settings=SETTINGS, k=4, gradient_directions=3, lr=2e-2)


def test_all_ways_learn_and_the_bank_trains_and_stores_least(job, tiny):
    rows = {method: train_new_task(replace(job, method=method))[0] for method in newtask.METHODS}
    majority = tiny.task("colours", train=40, test=40).majority
    assert rows["bank"].accuracy > majority + 0.1 and rows["lora"].accuracy > majority + 0.1
    # 6 modules of one layer, 2 x (4 + 3) coefficients a side
    assert rows["bank"].trained == 6 * 2 * 2 * 7
    assert rows["lora"].trained == 2 * (4 * (16 + 16) + 2 * (16 + 32))
    assert (rows["head"].trained, rows["head"].stored_bytes, rows["head"].bank_bytes) == (0, 0, None)
    assert rows["bank"].bank_bytes is not None and rows["lora"].bank_bytes is None


def test_the_adapter_trained_in_the_bank_loads_and_gives_its_accuracy(job, tiny):
    row, folder = train_new_task(job)
    torch.manual_seed(0)  # the tiny base has random weights, drawn as in training
    model = load(tiny.classifier(2), folder, bank=job.bank)
    test = tiny.task("colours", train=40, test=40).test
    assert evaluate(model, tiny.tokenize, test) == row.accuracy == read_meta(folder)["accuracy"]
    written = (folder / "adapter_config.json").read_text() + (folder / "meta.json").read_text()
    assert str(tiny.folder) not in written
    tensors = load_file(folder / "adapter_model.safetensors")
    head = sum(tensor.nbytes for name, tensor in tensors.items() if "classifier" in name)
    assert row.stored_bytes == (folder / "adapter_model.safetensors").stat().st_size - head


def test_a_second_training_comes_from_the_cache_unless_the_bank_changed(job, monkeypatch):
    first = train_new_task(job)
    head = train_new_task(replace(job, method="head"))
    monkeypatch.setattr("adapterbank.demo.train.fit", None)
    assert train_new_task(job) == first
    bank = Bank.load(job.bank)
    bank.rename("a0", "renamed")
    bank.save(job.bank)
    with pytest.raises(TypeError):
        train_new_task(job)
    assert train_new_task(replace(job, method="head")) == head  # no bank in it


def test_the_lora_is_that_of_any_adapter_with_its_settings(job):
    assert train_new_task(replace(job, method="lora"))[1] == train_adapter(SETTINGS)
