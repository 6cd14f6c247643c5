"""shira info, fuse, switch and export."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterbank import LoraAdapter, SparseDelta
from sparse import Net, make_delta


@pytest.fixture
def pair(tmp_path):
    for i, name in enumerate(("law", "news")):
        make_delta(Net(), seed=i, base="org/base", mask="rand").save(tmp_path / name)
    return tmp_path / "law", tmp_path / "news"


def test_info_says_what_is_changed(run, object_of, pair):
    found = object_of("shira", "info", pair[0])
    assert (found["name"], found["base"], found["mask"], found["values"]) == ("law", "org/base", "rand", 280)
    assert found["parameters"] == {"body.q.weight": 160, "first.weight": 120} and found["knows_its_base"]
    shown = run("shira", "info", pair[0]).stdout
    assert "first.weight" in shown and "40 x 30" in shown and "10.00%" in shown and "It knows its base again" in shown


def test_fuse_writes_the_weighted_sum_and_tells_the_interference(run, object_of, pair, tmp_path):
    found = object_of("shira", "fuse", *pair, "-o", tmp_path / "both", "--weight", "news=0.5")
    fused = SparseDelta.load(tmp_path / "both")
    expected = sum(
        w * SparseDelta.load(p).updates["first.weight"].dense().float() for w, p in zip((1, 0.5), pair, strict=True)
    )
    torch.testing.assert_close(fused.updates["first.weight"].dense().float(), expected, rtol=1e-3, atol=1e-4)
    assert found["values"] == fused.nnz
    (between,) = found["interference"]
    assert between["between"] == ["law", "news"] and 0 < between["overlap"] < 0.3 and between["awom"] > 0
    shown = run("shira", "fuse", *pair, "-o", tmp_path / "again").stdout
    assert "AWOR" in shown and "law, news" in shown


def test_switch_changes_a_copy_or_the_files_themselves(run, object_of, refused, pair, tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    save_file(Net().state_dict(), base / "model.safetensors")
    found = object_of("shira", "switch", base, pair[0], "-o", out)
    assert found == {"model": str(out), "before": None, "adapter": "law", "left_out": []}
    expected = Net()
    SparseDelta.load(pair[0]).apply_(expected)
    assert torch.equal(load_file(out / "model.safetensors")["first.weight"], expected.first.weight)
    assert run("shira", "switch", out, pair[1]).stdout == f"{out} holds 'news'.\n"
    assert "give an adapter, or --restore" in refused("shira", "switch", out, pair[1], "--restore")
    assert object_of("shira", "switch", out)["adapter"] == "news"
    assert run("shira", "switch", out, "--restore").stdout == f"{out} holds the base model.\n"
    assert (out / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_switch_that_is_refused_leaves_no_copy(refused, pair, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    save_file(Net(seed=1).state_dict(), base / "model.safetensors")
    before = (base / "model.safetensors").read_bytes()
    assert "has other values than the base" in refused("shira", "switch", base, pair[0], "-o", tmp_path / "out")
    assert "alpha=nan is no strength" in refused("shira", "switch", base, pair[0], "--alpha", "nan")
    assert not (tmp_path / "out").exists() and (base / "model.safetensors").read_bytes() == before


def test_info_on_several_says_what_they_share(run, object_of, pair, tmp_path):
    found = object_of("shira", "info", *pair, f"twin={pair[0]}")
    assert [told["name"] for told in found["adapters"]] == ["law", "news", "twin"]
    assert found["overlap"]["law"]["twin"] == 1 and 0 < found["overlap"]["law"]["news"] < 0.3
    assert found["advice"].startswith("law and twin share 100% of their positions")
    shown = run("shira", "info", *pair).stdout
    assert "280" in shown and "org/base" in shown and "share 100%" not in shown
    assert "in news" in shown


def test_fuse_draws_the_comparison_and_warns_of_adapters_on_the_same_weights(run, object_of, pair, tmp_path):
    words = ("shira", "fuse", pair[0], f"twin={pair[0]}", "--picture", tmp_path / "pair.svg")
    shown = run(*words, "-o", tmp_path / "both").stdout
    assert "law and twin share 100% of their positions" in shown and "pair.svg" in shown
    assert "1  base" in (tmp_path / "pair.svg").read_text()
    assert object_of(*words, "-o", tmp_path / "again")["advice"] is not None


@pytest.mark.parametrize("kind", ["supertuning", "lora"])
def test_export_writes_what_others_read(object_of, pair, tmp_path, kind):
    told = object_of("shira", "export", pair[0], "-o", tmp_path / "out", "--as", kind, "-r", 30)
    if kind == "lora":
        update = SparseDelta.load(pair[0]).updates["first.weight"].dense().float()
        restored = LoraAdapter.load(tmp_path / "out").factors("first").update()
        torch.testing.assert_close(restored, update, rtol=1e-3, atol=1e-4)
        assert 0 < told["largest_error"] < 0.2  # of 40 x 40 at rank 30
    else:
        again = SparseDelta.load(tmp_path / "out", model=Net())
        assert torch.equal(again.updates["first.weight"].positions,
                           SparseDelta.load(pair[0]).updates["first.weight"].positions)  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fuse", "{law}", "{law}", "-o", "{out}"], "two adapters have one name"),
        (["fuse", "{law}", "-o", "{out}", "--weight", "law"], "--weight law: give NAME=NUMBER"),
        (["fuse", "{law}", "-o", "{out}", "--weight", "tax=1"], "weights has 'tax'"),
        (["export", "{law}", "-o", "{out}", "--as", "shira"], "PEFT's SHiRA holds r (d_in + d_out) values"),
        (["info", "{out}"], "does not exist"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(refused, pair, tmp_path, words, message):
    places = {"law": pair[0], "out": tmp_path / "out"}
    assert message in refused("shira", *(word.format(**places) for word in words))
    assert not (tmp_path / "out").exists()
