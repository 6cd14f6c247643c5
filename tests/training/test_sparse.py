"""Training sparse adapters from files, on a tiny random model: a few steps each, on the real Trainer."""

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from adapterbank.errors import AdapterBankError
from adapterbank.shira import SparseDelta
from adapterbank.training.run_directory import last_checkpoint
from adapterbank.training.sparse import SparseSettings, train_sparse
from tiny_texts import Stop, stop_at

# PEFT 0.21 still asks transformers 5 for a name that it renamed
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
SETTINGS = SparseSettings(task="seq-cls", epochs=2, batch=8, density=0.1)


def train(home, out, settings=SETTINGS, **options):
    return train_sparse(home / "tiny-bert", home / "train.jsonl", out, settings, **options)


def base_of(home):
    torch.manual_seed(7)  # whatever head the base gets, the adapter brings its own
    return AutoModelForSequenceClassification.from_pretrained(home / "tiny-bert", num_labels=2)


@pytest.mark.parametrize("mask", ["snip", "wm"])
def test_training_learns_and_the_adapter_gives_the_reported_accuracy(bert, tmp_path, mask):
    settings = replace(SETTINGS, epochs=8, batch=4, mask=mask, lr=1e-2)
    result = train(bert, tmp_path / "out", settings, eval_data=bert / "train.jsonl")
    assert result.after.loss < result.before.loss and result.after.accuracy > result.before.accuracy
    files = {"adapter_config.json", "adapter_model.safetensors", "labels.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    # query and value of two layers, 32 x 32 each
    assert (result.trained - result.head, result.head) == (4 * 102, 2 * 32 + 2)
    model = PeftModel.from_pretrained(base_of(bert), tmp_path / "out").eval()
    rows = [json.loads(line) for line in (bert / "train.jsonl").read_text().splitlines()]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(bert / "tiny-bert")
    inputs = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    right = model(**inputs).logits.argmax(-1) == torch.tensor([result.labels.index(row["label"]) for row in rows])
    assert float(right.float().mean()) == pytest.approx(result.after.accuracy)


def test_the_file_is_a_sparse_adapter_in_16_bits_that_names_no_folder(bert, tmp_path):
    train(bert, tmp_path / "out")
    config = (tmp_path / "out" / "adapter_config.json").read_text()
    assert str(bert) not in config and str(tmp_path) not in config
    delta = SparseDelta.load(tmp_path / "out")
    assert (delta.mask, delta.nnz) == ("wm", 4 * 102)
    assert all(update.values.element_size() == 2 for update in delta.updates.values())
    delta.apply_(base_of(bert))  # whose fingerprint it knows


def test_looking_for_positions_is_told_batch_by_batch(bert, tmp_path):
    told = []
    train(bert, tmp_path / "out", replace(SETTINGS, epochs=1, mask="grad"), progress=lambda *words: told.append(words))
    steps = [words for words in told if words[0] == "sum gradients"]
    assert len(steps) > 1 and steps == [("sum gradients", n, len(steps)) for n in range(1, len(steps) + 1)]


def test_equal_settings_give_equal_files_and_another_seed_does_not(bert, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(bert, tmp_path / name, replace(SETTINGS, epochs=1, seed=seed))
    a, b, c = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("mask", ["snip", "rand"])
def test_a_resumed_training_ends_where_an_uninterrupted_one_does(bert, tmp_path, mask):
    settings = replace(SETTINGS, epochs=3, mask=mask)
    whole = train(bert, tmp_path / "whole", settings)
    with pytest.raises(Stop):
        train(bert, tmp_path / "halves", settings, progress=stop_at(13))  # in the third epoch of 5 steps each
    assert last_checkpoint(tmp_path / "halves").name == "checkpoint-10"
    with pytest.raises(AdapterBankError, match=r"a training with density=0\.1, now it is 0\.2"):
        train(bert, tmp_path / "halves", replace(settings, density=0.2), resume=True)
    halves = train(bert, tmp_path / "halves", settings, resume=True)
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "halves"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert (halves.before, halves.epochs) == (whole.before, whole.epochs)


def test_adapters_of_different_parts_share_no_weight(bert, tmp_path):
    masks = []
    for part in (0, 1):
        train(bert, tmp_path / str(part), replace(SETTINGS, epochs=1, mask="wm", part=part))
        masks.append(SparseDelta.load(tmp_path / str(part)).updates)
    for name, update in masks[0].items():
        assert not torch.isin(update.positions, masks[1][name].positions).any()


def test_settings_are_checked_before_anything_is_read():
    with pytest.raises(AdapterBankError, match=r"density=2\.0 is no share"):
        SparseSettings(task="seq-cls", density=2.0)
    with pytest.raises(AdapterBankError, match="mask='best' is unknown"):
        SparseSettings(task="seq-cls", mask="best")
    with pytest.raises(AdapterBankError, match="epochs=0 is too small"):
        SparseSettings(task="seq-cls", epochs=0)
