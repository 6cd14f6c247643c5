"""shira mask."""

import json

import pytest
import torch

from adapterbank.cli.masks import _kinds
from adapterbank.shira import masks
from tiny_models import gpt2, llama

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model on disk: 3 layers, of 32 x 32 and 16 x 32 what LoRA adapts; read only."""
    path = tmp_path_factory.mktemp("mask") / "base"
    llama().save_pretrained(path)
    return path


@pytest.mark.parametrize("mask", ["wm", "rand", "struct"])
def test_counts_are_those_of_the_masks(run, object_of, base, mask):
    found = object_of("shira", "mask", base, "--mask", mask, "--density", 0.1)
    weights = {name: module.weight for name, module in llama().named_modules() if name.endswith(("q_proj", "v_proj"))}
    counts = {name: len(masks.choose(mask, weight, 0.1)) for name, weight in weights.items()}
    assert {layer: kind["values"] for kind in found["kinds"] for layer in kind["layers"]} == counts
    assert found["values"] == sum(counts.values())
    assert found["density"] == found["values"] / sum(weight.numel() for weight in weights.values())
    assert [kind["name"] for kind in found["kinds"]] == [f"model.layers.*.self_attn.{n}_proj" for n in "qv"]
    shown = run("shira", "mask", base, "--mask", mask, "--density", 0.1).stdout
    assert "16 x 32" in shown and f"{found['values']:,}" in shown and found["advice"] in shown


def test_the_family_that_is_asked_for_is_drawn_and_advised(object_of, base, tmp_path):
    found = object_of("shira", "mask", base, "--layers", "mlp.*down", "--density", 0.2, "--part", 1, "--adapters", 3,
                      "--picture", tmp_path / "masks.svg")  # fmt: skip
    assert (found["parts"], found["kinds"][0]["shape"], len(found["kinds"][0]["layers"])) == (4, [32, 64], 3)
    drawn = (tmp_path / "masks.svg").read_text()
    assert [f"part {part}</text>" in drawn for part in range(5)] == [False, True, True, True, False]
    crowd = object_of("shira", "mask", base, "--density", 0.2, "--adapters", 9)
    assert crowd["advice"].startswith("9 adapters don't fit side by side")


def test_layers_stand_as_the_model_stores_them(object_of, tmp_path):
    gpt2().save_pretrained(tmp_path / "base")
    (kind,) = object_of("shira", "mask", tmp_path / "base", "--mask", "rand")["kinds"]
    assert kind["shape"] == [32, 96] and len(kind["layers"]) == 2  # Conv1D: inputs first
    some = object_of("shira", "mask", tmp_path / "base", "--mask", "rand", "--layers", "attn|mlp")["kinds"]
    assert [kind["name"].removeprefix("transformer.h.*.") for kind in some] == [
        "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"
    ]  # fmt: skip


def test_layers_of_one_name_and_two_shapes_are_two_kinds():
    shapes = {"h.0.q": (2, 3), "h.1.q": (2, 3), "h.2.q": (3, 3), "2.v": (2, 3), "v": (2, 3)}
    found = _kinds({name: torch.zeros(shape) for name, shape in shapes.items()})
    assert {kind.name: kind.layers for kind in found} == {
        "h.*.q of 2 x 3": ["h.0.q", "h.1.q"], "h.2.q": ["h.2.q"], "2.v": ["2.v"], "v": ["v"]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mask", "snip"], "'snip' follows the task's gradient, which a model alone doesn't have"),
        (["--mask", "rand", "--part", "1"], "part=1: rand has none, wm has"),
        (["--mask", "rand", "--seed", "-1"], "seed=-1 is negative"),
        (["--density", "0"], "density=0.0 is no share"),
        (["--part", "1", "--density", "0.6"], "has no 2 parts"),
        (["--adapters", "0"], "adapters=0 is no family"),
        (["--adapters", "3", "--density", "0.5", "--picture", "{out}"], "has no 3 parts"),
        (["--layers", "nothing"], "--layers nothing: no linear layer has it in its name"),
        (["--layers", "("], "--layers ( is no regular expression"),
        (["--picture", "{out}/no/such.svg"], "No such file or directory"),
    ],
)
def test_bad_input_is_one_line(refused, base, tmp_path, words, message):
    assert message in refused("shira", "mask", base, *(word.format(out=tmp_path / "out") for word in words))
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_not_there_is_one_line(refused, tmp_path):
    assert "nothing can't be loaded as a base model" in refused("shira", "mask", tmp_path / "nothing")


def test_a_config_that_names_no_model_is_read_by_its_type(object_of, base, tmp_path):
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["Trainer"]}))
    (first, _) = object_of("shira", "mask", tmp_path, "--mask", "struct")["kinds"]
    assert first["name"] == "layers.*.self_attn.q_proj"
