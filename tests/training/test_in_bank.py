"""Training from files, on tiny random models: a few steps each, on the real Trainer."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)

from adapterbank.bank import Bank
from adapterbank.errors import AdapterBankError, MissingFileError
from adapterbank.training.examples import read_examples
from adapterbank.training.in_bank import TaskSettings, train_task
from adapterbank.training.run_directory import last_checkpoint
from adapterbank.tuner import load
from tiny_models import TARGETS, adapters_for
from tiny_texts import VOCABULARY, WORDS, Stop, save_bank, save_base, save_rows, stop_at

# PEFT 0.21 still asks transformers 5 for a name that it renamed
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

PLAIN = {"r": 4, "k": 8, "start": "base", "gradient_directions": 0, "batch": 8}
"""Nothing but coefficients on the bank's own directions."""
SETTINGS = TaskSettings(task="seq-cls", epochs=2, **PLAIN)


def train(home, out, settings=SETTINGS, **options):
    bank, base = home / "colours", home / "tiny-bert"
    return train_task(bank, base, home / "train.jsonl", out, settings, **options)


def labels_of(out):
    return json.loads((out / "labels.json").read_text())


# --- the three tasks --------------------------------------------------------------------------------------------------


def test_training_learns_and_the_adapter_gives_the_reported_accuracy(bert, tmp_path):
    stages = []
    settings = replace(SETTINGS, epochs=8, batch=4)
    result = train(
        bert, tmp_path / "out", settings, eval_data=bert / "train.jsonl", progress=lambda *told: stages.append(told)
    )
    assert result.after.loss < result.before.loss and result.after.accuracy > result.before.accuracy
    assert len(result.epochs) == 8 and result.epochs[-1] == result.after
    assert ("train", 1, 80) in stages and ("train", 80, 80) in stages
    files = {"adapter_config.json", "adapter_model.safetensors", "labels.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    assert labels_of(tmp_path / "out") == result.labels == ["cold", "warm"]
    assert result.bytes == (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    # 4 modules, 4 x (8 + 8) coefficients each, and the head
    assert (result.trained - result.head, result.head) == (4 * 4 * 16, 2 * 32 + 2)
    torch.manual_seed(7)  # whatever head the base gets, the adapter brings its own
    base = AutoModelForSequenceClassification.from_pretrained(bert / "tiny-bert", num_labels=2)
    model = load(base, tmp_path / "out", bank=bert / "colours")
    rows = [json.loads(line) for line in (bert / "train.jsonl").read_text().splitlines()]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(bert / "tiny-bert")
    inputs = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    right = model(**inputs).logits.argmax(-1) == torch.tensor([result.labels.index(row["label"]) for row in rows])
    assert float(right.float().mean()) == pytest.approx(result.after.accuracy)


def test_nothing_in_the_adapter_names_a_folder_on_this_disk(bert, tmp_path):
    train(bert, tmp_path / "out")
    config = (tmp_path / "out" / "adapter_config.json").read_text()
    assert str(bert) not in config and str(tmp_path) not in config
    assert json.loads(config)["base_model_name_or_path"] == "tiny/base" and json.loads(config)["bank"] == "colours"


def test_equal_settings_give_equal_files_and_another_seed_does_not(bert, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(bert, tmp_path / name, replace(SETTINGS, epochs=1, seed=seed))
    a, b, c = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_a_language_model_learns_completions_only(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(VOCABULARY), max_position_embeddings=16, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    base, bank = save_base(model, tmp_path / "base"), save_bank(model, TARGETS["llama"], tmp_path / "bank")
    rows = [{"prompt": f"{w} thing {i}", "completion": label} for i in range(10) for w, label in WORDS.items()]
    data = save_rows(tmp_path / "train.jsonl", rows)
    settings = TaskSettings(task="causal-lm", epochs=3, **PLAIN)
    result = train_task(bank, base, data, tmp_path / "out", settings, eval_data=data)
    assert result.after.loss < result.before.loss and result.labels == [] and result.head == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    tuned = load(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out", bank=bank)
    # the loss by hand: each completion is one word and the end, and the prompt has three words
    ids = torch.tensor([[VOCABULARY.index(w) for w in [*r["prompt"].split(), r["completion"], "<eos>"]] for r in rows])
    with torch.no_grad():
        logits = tuned(input_ids=ids).logits[:, 2:-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 3:].flatten())
    assert float(loss) == pytest.approx(result.after.loss, rel=1e-4)
    assert float((logits.argmax(-1) == ids[:, 3:]).float().mean()) == pytest.approx(result.after.accuracy)
    # plain texts work too
    texts = save_rows(tmp_path / "texts.jsonl", [{"text": f"{word} thing {i}"} for i in range(4) for word in WORDS])
    plain = train_task(bank, base, texts, tmp_path / "plain", replace(settings, epochs=1))
    assert math.isfinite(plain.after.loss)


def test_a_prompt_that_is_too_long_loses_its_beginning_and_never_its_completion():
    from adapterbank.training.examples import IGNORED, _tokens

    def tokenizer(text, add_special_tokens=True):
        return {"input_ids": [9] * add_special_tokens + [ord(letter) for letter in text]}

    tokenizer.eos_token_id = 0
    found = _tokens({"prompt": "abcdef", "completion": "XY"}, tokenizer, 5)
    assert found["input_ids"] == [ord("e"), ord("f"), ord("X"), ord("Y"), 0]
    assert found["labels"] == [IGNORED, IGNORED, ord("X"), ord("Y"), 0]
    assert _tokens({"text": "abc"}, tokenizer, 3)["input_ids"] == [ord("a"), ord("b"), ord("c")]
    assert _tokens({"text": "ab"}, tokenizer, 9)["input_ids"] == [9, ord("a"), ord("b"), 0]


@pytest.fixture
def vit(tmp_path):
    """Base, bank and images of two colours."""
    from PIL import Image
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4,
        num_labels=5, initializer_range=0.3,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    model.save_pretrained(tmp_path / "base")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "base")
    names = [name for name, layer in model.vit.named_modules() if isinstance(layer, torch.nn.Linear)]
    save_bank(model, {names[0].rpartition(".")[2]}, tmp_path / "bank")
    rows = []
    for i in range(24):
        label = i % 2
        colour = (200 + i, 40, 40) if label else (40, 40, 200 + i)
        path = tmp_path / "data" / "pictures" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 10), colour).save(path)
        rows.append({"image": f"pictures/{i}.png", "label": label})
    save_rows(tmp_path / "data" / "train.jsonl", rows)
    return tmp_path


def test_a_vision_model_learns_another_number_of_classes(vit):
    settings = TaskSettings(task="image-cls", epochs=3, **PLAIN)
    data = vit / "data" / "train.jsonl"
    result = train_task(vit / "bank", vit / "base", data, vit / "out", settings, eval_data=data)
    assert result.labels == ["0", "1"] and result.after.loss < result.before.loss
    base = AutoModelForImageClassification.from_pretrained(vit / "base", num_labels=2, ignore_mismatched_sizes=True)
    model = load(base, vit / "out", bank=vit / "bank")
    assert model.get_base_model().classifier.modules_to_save["default"].out_features == 2


def test_a_broken_image_is_named_and_leaves_nothing(vit):
    (vit / "data" / "pictures" / "3.png").write_bytes(b"no image")
    settings = TaskSettings(task="image-cls", epochs=1, **PLAIN)
    with pytest.raises(AdapterBankError, match=r"3\.png can't be read as an image"):
        train_task(vit / "bank", vit / "base", vit / "data" / "train.jsonl", vit / "out", settings)
    assert not (vit / "out").exists()


# --- going on after an interruption -----------------------------------------------------------------------------------


@pytest.mark.parametrize("directions", [0, 3])
def test_a_resumed_training_ends_where_an_uninterrupted_one_does(bert, tmp_path, directions):
    settings = replace(SETTINGS, epochs=3, gradient_directions=directions)
    whole = train(bert, tmp_path / "whole", settings)
    with pytest.raises(Stop):
        train(bert, tmp_path / "halves", settings, progress=stop_at(13))  # in the third epoch of 5 steps each
    assert last_checkpoint(tmp_path / "halves").name == "checkpoint-10"
    assert not (tmp_path / "halves" / "adapter_config.json").exists()
    halves = train(bert, tmp_path / "halves", settings, resume=True)
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "halves"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert (halves.before, halves.epochs) == (whole.before, whole.epochs)
    assert not (tmp_path / "halves" / "checkpoints").exists()


def test_a_training_that_stops_before_its_first_checkpoint_leaves_nothing(bert, tmp_path):
    with pytest.raises(Stop):
        train(bert, tmp_path / "new" / "out", progress=stop_at(2))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    with pytest.raises(Stop):
        train(bert, tmp_path / "empty", progress=stop_at(2))
    assert list(tmp_path.rglob("*")) == [tmp_path / "empty"]


def test_an_unfinished_training_is_neither_overwritten_nor_mixed_with_another(bert, tmp_path):
    with pytest.raises(Stop):
        train(bert, tmp_path / "out", progress=stop_at(7))
    with pytest.raises(AdapterBankError, match="holds an unfinished training; resume it"):
        train(bert, tmp_path / "out")
    with pytest.raises(AdapterBankError, match=r"a training with batch=8, now it is 4; resume with the same"):
        train(bert, tmp_path / "out", replace(SETTINGS, batch=4), resume=True)
    # a checkpoint that was being written when the power went
    (tmp_path / "out" / "checkpoints" / "checkpoint-9").mkdir()
    assert last_checkpoint(tmp_path / "out").name == "checkpoint-5"
    train(bert, tmp_path / "out", resume=True)
    with pytest.raises(AdapterBankError, match="holds an adapter already"):
        train(bert, tmp_path / "out", resume=True)


def test_to_resume_what_was_never_begun_begins_it(bert, tmp_path):
    assert train(bert, tmp_path / "out", replace(SETTINGS, epochs=1), resume=True).epochs


# --- defaults that the bank decides -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fit", "adapters", "k"),
    [
        ({"max_error": 0.1}, None, 16), ({"max_error": 0.1}, 2, None), ({"k": 4}, None, None),
        ({"method": "eigenlora", "k": 4}, None, None), ({"method": "flat", "k": 3}, None, None),
    ],
    ids=str,
)  # fmt: skip
def test_the_defaults_fit_every_bank(bert, tmp_path, fit, adapters, k):
    members = adapters_for(BertModel.from_pretrained(bert / "tiny-bert"), TARGETS["bert"])[:adapters]
    bank = Bank.fit(members, **fit)
    bank.save(tmp_path / "bank")
    flat = fit.get("method") == "flat"
    # so low a rate that what is saved is the start
    settings = TaskSettings(task="seq-cls", epochs=1, lr=1e-30, r=members[0].rank if flat else 2)
    place = tmp_path / "bank", bert / "tiny-bert", bert / "train.jsonl"
    result = train_task(*place, tmp_path / "out", settings)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["k"], config["gradient_directions"]) == (k, 0 if flat else 16)
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any(tensor.abs().max() > 1e-6 for name, tensor in saved.items() if "eig_coef_B" in name)
    base = train_task(*place, tmp_path / "base", replace(settings, start="base"))
    assert result.before == base.before


# --- gradient directions ----------------------------------------------------------------------------------------------


def test_gradient_directions_are_stored_with_the_adapter(bert, tmp_path):
    result = train(bert, tmp_path / "out", replace(SETTINGS, gradient_directions=3))
    assert result.trained - result.head == 4 * 4 * (16 + 6)
    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any("eig_gradient_in" in name for name in names)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["gradient_directions"] == 3
    base = AutoModelForSequenceClassification.from_pretrained(bert / "tiny-bert", num_labels=2)
    load(base, tmp_path / "out", bank=bert / "colours")


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "lines", "message"),
    [
        ("seq-cls", ['{"text": "a", "label": "x"}', "", "{text}"], r"train.jsonl, line 3: no JSON \("),
        ("seq-cls", ['{"text": "a", "label": "x"}', '["a"]'], r"line 2: a list, expected \{\"text\""),
        ("seq-cls", ['{"text": "a"}'], r"line 1: no 'label'; expected \{\"text\": ..., \"label\": ...\}"),
        ("seq-cls", ['{"text": "a", "label": true}'], "line 1: 'label' is true, expected text or a whole number"),
        ("seq-cls", ['{"text": 3, "label": "x"}'], "line 1: 'text' is 3, expected text"),
        ("seq-cls", ['{"text": " ", "label": "x"}'], "line 1: 'text' is empty; leave the line out"),
        ("causal-lm", ['{"prompt": "a"}'], "line 1: no 'completion'"),
        ("image-cls", ['{"image": "no/such.png", "label": 1}'], r"line 1: there is no image .*no/such.png; paths are"),
        ("seq-cls", ["", " "], "is empty; expected one JSON object a line"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, task, lines, message):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(AdapterBankError, match=message):
        read_examples(path, task)


def test_bytes_that_are_no_text_are_no_json(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b'{"text": "\xff", "label": "x"}\n')
    with pytest.raises(AdapterBankError, match="line 1: no JSON"):
        read_examples(tmp_path / "train.jsonl", "seq-cls")


def test_images_without_pillow_are_refused_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr("adapterbank.training.examples.is_vision_available", lambda: False)
    with pytest.raises(AdapterBankError, match="pip install pillow"):
        read_examples(tmp_path / "train.jsonl", "image-cls")


def test_missing_files_one_class_and_strange_labels_are_refused_before_anything_is_written(bert, tmp_path):
    out, base, bank = tmp_path / "out", bert / "tiny-bert", bert / "colours"
    with pytest.raises(MissingFileError, match=r"nothing.jsonl isn't a file"):
        train_task(bank, base, tmp_path / "nothing.jsonl", out, SETTINGS)
    one = save_rows(tmp_path / "one.jsonl", [{"text": "red", "label": "warm"}] * 3)
    with pytest.raises(AdapterBankError, match="all 3 examples have the label 'warm'"):
        train_task(bank, base, one, out, SETTINGS)
    other = save_rows(tmp_path / "other.jsonl", [{"text": "red", "label": "hot"}])
    with pytest.raises(AdapterBankError, match=r"label 'hot' is none of those in the training data: cold, warm"):
        train(bert, out, eval_data=other)
    with pytest.raises(MissingFileError):
        train_task(tmp_path / "bank", base, bert / "train.jsonl", out, SETTINGS)
    with pytest.raises(AdapterBankError, match=r"no-model can't be loaded as a model for seq-cls: "):
        train_task(bank, tmp_path / "no-model", bert / "train.jsonl", out, SETTINGS)
    with pytest.raises(AdapterBankError, match="r=40 is more than"):
        train(bert, out, replace(SETTINGS, r=40))
    assert not out.exists()


def test_a_model_without_a_language_head_is_no_language_model(bert, tmp_path):
    data = save_rows(tmp_path / "texts.jsonl", [{"text": "red thing"}] * 4)
    settings = TaskSettings(task="causal-lm", **PLAIN)
    with pytest.raises(AdapterBankError, match=r"is no language model: it has no cls\.predictions"):
        train_task(bert / "colours", bert / "tiny-bert", data, tmp_path / "out", settings)


def test_a_diverging_training_is_an_error_and_no_adapter(bert, tmp_path):
    with pytest.raises(AdapterBankError, match="the loss is no number any more after epoch 1; use a lower lr"):
        train(bert, tmp_path / "out", replace(SETTINGS, lr=1e30, head_lr=1e30))
    assert not (tmp_path / "out").exists()


def test_a_directory_with_something_else_is_left_alone(bert, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    for resume in (False, True):
        with pytest.raises(AdapterBankError, match="isn't empty; give a new or empty directory"):
            train(bert, tmp_path / "out", resume=resume)
    with pytest.raises(AdapterBankError, match="is a file"):
        train(bert, tmp_path / "out" / "mine.txt")


@pytest.mark.parametrize(
    ("field", "value"),
    [("task", "poetry"), ("epochs", 0), ("batch", 0), ("lr", 0.0), ("head_lr", math.nan), ("eval_share", 1.0)],
)
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(AdapterBankError, match=rf"{field}="):
        replace(SETTINGS, **{field: value})


def test_labels_that_are_numbers_are_in_the_order_of_numbers(bert, tmp_path):
    rows = [
        {"text": word, "label": label}
        for word, label in zip(["red", "blue", "green", "orange"], (10, 9, 2, 9), strict=True)
    ]
    data = save_rows(tmp_path / "train.jsonl", rows * 3)
    result = train_task(
        bert / "colours", bert / "tiny-bert", data, tmp_path / "out", replace(SETTINGS, epochs=1, eval_share=0.3)
    )
    assert result.labels == ["2", "9", "10"] and (result.examples, result.eval_examples) == (8, 4)
