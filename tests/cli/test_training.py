"""The command that trains, on a tiny random model."""

import importlib
import json

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from adapterbank.bank import Bank
from tiny_models import TARGETS, adapters_for, bert

# PEFT 0.21 still asks transformers 5 for a name that it renamed
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Base, bank and data; read only."""
    from transformers import PreTrainedTokenizerFast

    home = tmp_path_factory.mktemp("train")
    model = bert()
    model.save_pretrained(home / "base")
    vocabulary = {word: i for i, word in enumerate(("<pad>", "<unk>", "red", "blue", "thing"))}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>").save_pretrained(home / "base")
    Bank.fit(adapters_for(model, TARGETS["bert"]), max_error=0.1).save(home / "bank")
    rows = [{"text": f"{word} thing", "label": f"is {word}"} for word in ("red", "blue")] * 10
    (home / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


@pytest.fixture
def words(home, tmp_path):
    """The command's words for a short training into ``tmp_path / "out"``."""
    wanted = {"--bank": home / "bank", "--model": home / "base", "--data": home / "train.jsonl", "--task": "seq-cls"}
    wanted |= {"-o": tmp_path / "out", "-k": 8, "-r": 4, "--epochs": 2, "--batch": 4}
    return ["train", *(word for pair in wanted.items() for word in pair)]


def test_train_writes_an_adapter_and_shows_what_it_took(run, words, home, tmp_path):
    result = run(*words, "--eval", home / "train.jsonl")
    assert result.exit_code == 0 and result.stderr == "", result.output
    size = (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    # 4 modules, 4 x (24 + 24) coefficients on 8 of the bank's and 16 of the gradient's, and a head of 32 x 2 + 2
    line = next(line for line in result.stdout.splitlines() if "seq-cls" in line)
    assert all(cell in line for cell in ("834", "66", f"{size:,}"))
    assert "Measured on 20 examples" in result.stdout


def test_json_holds_the_whole_result(object_of, words, tmp_path):
    found = object_of(*words, "--gradient-directions", 2, "--lr", "0.01", "--eval-share", 0.2)
    assert found["out"] == str(tmp_path / "out") and found["labels"] == ["is blue", "is red"]
    assert (found["examples"], found["eval_examples"], len(found["epochs"])) == (16, 4, 2)
    assert found["trained"] - found["head"] == 4 * 4 * (10 + 10)
    assert found["after"] == found["epochs"][-1] and found["before"] != found["after"]


def test_a_core_is_one_matrix_a_module_and_joins_the_bank_in_few_bytes(object_of, words, home, tmp_path):
    found = object_of(*words, "--core")
    assert found["trained"] - found["head"] == 4 * 8 * 8
    bank = Bank.load(home / "bank")
    bank.add({"core": tmp_path / "out"}, max_error=0.1)
    assert bank["core"].task.k == 8 and bank["core"].error <= 0.1


def test_a_core_takes_all_directions_of_a_small_bank(object_of, words):
    at = words.index("-k")
    found = object_of(*words[:at], *words[at + 2 :], "--core")
    assert found["trained"] - found["head"] == 4 * 20 * 20  # 5 members of rank 4


def test_resume_continues_an_interrupted_training(run, object_of, words, home, tmp_path, monkeypatch):
    from adapterbank.training import trainer

    told = trainer.Telling.on_step_end

    def interrupted(self, args, state, control, **kwargs):
        told(self, args, state, control, **kwargs)
        if state.global_step == 7:  # 5 steps an epoch
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Telling, "on_step_end", interrupted)
    result = run(*words)
    assert (result.exit_code, result.stderr) == (130, "Interrupted.\n")
    monkeypatch.undo()
    assert run(*words).stderr.startswith(f"Error: {tmp_path}/out holds an unfinished training; resume it")
    assert len(object_of(*words, "--resume")["epochs"]) == 2
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "labels.json")
    }


def test_a_core_takes_no_directions_of_the_gradient(refused, words):
    assert "leave them out, or train coefficients" in refused(*words, "--core", "--gradient-directions", 4)


def test_bad_input_is_one_line_and_leaves_nothing(refused, words, home, tmp_path):
    def instead(option, value):
        at = words.index(option) + 1
        return [*words[:at], value, *words[at + 1 :]]

    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "red", "label": "a"}\n{"text": "red"\n')
    assert f"{bad}, line 2: no JSON" in refused(*instead("--data", bad))
    bad.write_text('{"text": "red"}\n')
    assert "line 1: no 'label'; expected" in refused(*instead("--data", bad))
    bad.write_text('{"text": "red", "label": "a"}\n')
    assert "all 1 examples have the label 'a'" in refused(*instead("--data", bad))
    assert "isn't a file" in refused(*instead("--data", tmp_path / "nothing.jsonl"))
    assert "holds no bank.json" in refused(*instead("--bank", tmp_path / "nothing"))
    assert "can't be loaded as a model for seq-cls" in refused(*instead("--model", tmp_path / "nothing"))
    assert "epochs=0 is too small" in refused(*instead("--epochs", 0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl"]
    assert "isn't empty" in refused(*instead("-o", home))


def test_an_unknown_task_is_exit_code_2(run, words):
    at = words.index("seq-cls")
    assert run(*words[:at], "poetry", *words[at + 1 :]).exit_code == 2


def test_train_says_what_is_not_installed(refused, words, monkeypatch):
    monkeypatch.setattr("adapterbank.cli.training.find_spec", lambda name: None)
    line = refused(*words)
    assert "training needs peft and transformers and accelerate: pip install 'adapterbank[peft]'" in line


def test_shira_train_writes_a_sparse_adapter(run, object_of, refused, home, tmp_path):
    words = ["shira", "train", "--model", home / "base", "--data", home / "train.jsonl", "--task", "seq-cls"]
    found = object_of(*words, "-o", tmp_path / "law", "--density", 0.1, "--batch", 4, "--eval", home / "train.jsonl")
    # 4 modules of 32 x 32, and a head of 32 x 2 + 2
    assert (found["trained"], found["head"]) == (4 * 102 + 66, 66) and len(found["epochs"]) == 3
    told = object_of("shira", "info", tmp_path / "law")
    assert (told["mask"], told["values"], told["knows_its_base"]) == ("wm", 408, True)
    shown = run(*words, "-o", tmp_path / "news", "--mask", "snip", "--part", 1, "--epochs", 1)
    assert shown.exit_code == 0 and "Task" in shown.stdout and shown.stderr == ""
    line = refused(*words, "-o", tmp_path / "tax", "--mask", "rand", "--part", 1)
    assert "part=1: only wm, grad and snip have parts" in line and not (tmp_path / "tax").exists()


@pytest.mark.parametrize(("words", "where", "of"), [
    (["train"], "in_bank.TaskSettings", "coefficients"), (["shira", "train"], "sparse.SparseSettings", "values")
])  # fmt: skip
def test_help_names_the_rates_that_are_used(run, words, where, of):
    module, _, name = where.partition(".")
    settings = getattr(importlib.import_module(f"adapterbank.training.{module}"), name)(task="seq-cls")
    text = " ".join(run(*words, "--help").stdout.split())
    assert f"Of the {of}. By default {settings.lr:g}." in text
    assert f"Of the head. By default {settings.head_lr:g}." in text
