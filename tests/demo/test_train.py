import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from adapterbank.demo.assets import AssetError
from adapterbank.demo.models import MINILM_ID
from adapterbank.demo.train import TrainSettings, evaluate, fit, peft_model, probe_accuracy, read_meta, train_adapter

# PEFT 0.21 still asks transformers 5 for a name that it renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SETTINGS = TrainSettings(task="colours", examples=40, test_examples=40, epochs=6, batch=8, lr=2e-2, r=2)


def factors_A(model):
    return {name: p.detach() for name, p in model.named_parameters() if "lora_A" in name}


def test_adapters_of_one_init_seed_start_in_the_same_place(tiny):
    # three labels instead of two: the head's draws must not shift those of A
    one, other = (factors_A(peft_model(SETTINGS, labels)) for labels in (2, 3))
    assert all(torch.equal(one[name], other[name]) for name in one)
    private = factors_A(peft_model(replace(SETTINGS, init_seed=1), 2))
    assert not any(torch.equal(one[name], private[name]) for name in one)


def test_only_the_blocks_linears_and_the_head_are_trained(tiny):
    model = peft_model(SETTINGS, 2)
    adapted = {name.rsplit(".lora_A", 1)[0].rsplit("layer.0.", 1)[1] for name in factors_A(model)}
    attention = {f"attention.self.{name}" for name in ("query", "key", "value")} | {"attention.output.dense"}
    assert adapted == attention | {"intermediate.dense", "output.dense"}
    others = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert {name.split(".")[-1] for name in others} == {"weight", "bias"} and all("classifier" in n for n in others)


def test_training_learns_the_task(tiny):
    task = tiny.task("colours", train=40, test=40)
    model = peft_model(SETTINGS, 2)
    steps = []
    fit(model, tiny.tokenize, task, SETTINGS, progress=lambda done, total: steps.append((done, total)))
    assert evaluate(model, tiny.tokenize, task.test) > task.majority + 0.2
    assert steps == [(i + 1, 30) for i in range(30)]


def test_equal_settings_give_the_same_adapter(tiny):
    weights = [load_file(train_adapter(SETTINGS, tiny.folder / n) / "adapter_model.safetensors") for n in ("a", "b")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_trained_adapter_is_a_peft_directory_with_its_accuracy_and_no_local_path(tiny):
    from peft import PeftModel

    adapter = train_adapter(SETTINGS)
    assert sorted(p.name for p in adapter.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "meta.json",
    ]
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == MINILM_ID
    assert str(tiny.folder) not in (adapter / "meta.json").read_text() + (adapter / "adapter_config.json").read_text()
    torch.manual_seed(0)  # the tiny base has random weights, drawn as in training
    model = PeftModel.from_pretrained(tiny.classifier(2), adapter)
    test = tiny.task("colours", train=40, test=40).test
    assert evaluate(model, tiny.tokenize, test) == read_meta(adapter)["accuracy"]


def test_a_second_training_comes_from_the_cache(tiny, monkeypatch):
    adapter = train_adapter(SETTINGS)
    monkeypatch.setattr("adapterbank.demo.train.fit", None)
    assert train_adapter(SETTINGS) == adapter
    with pytest.raises(TypeError):  # other settings aren't in the cache
        train_adapter(replace(SETTINGS, seed=1))


def test_an_interrupted_training_leaves_nothing(tiny):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_adapter(SETTINGS, tiny.folder / "a" / "b", progress=interrupt)
    assert not (tiny.folder / "a").exists()


def test_a_folder_with_something_else_is_not_overwritten(tiny):
    train_adapter(SETTINGS, tiny.folder / "a")
    with pytest.raises(AssetError, match="isn't the adapter of TrainSettings"):
        train_adapter(replace(SETTINGS, seed=1), tiny.folder / "a")


def test_accuracy_is_the_share_of_right_answers(tiny):
    class Constant(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            return type("Output", (), {"logits": torch.tensor([[0.0, 1.0]]).expand(len(input_ids), 2)})

    examples = [("a " * (i % 5 + 1), int(i % 4 == 0)) for i in range(100)]
    assert evaluate(Constant(), tiny.tokenize, examples) == 0.25


def test_the_probe_reads_a_task_that_single_words_decide(tiny):
    task = tiny.task("colours", train=100, test=100)
    assert probe_accuracy(tiny.tokenize, task) > task.majority + 0.2
