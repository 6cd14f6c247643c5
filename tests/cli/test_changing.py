"""remove, rename and export."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterbank import Bank, LoraAdapter


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_remove_drops_members_and_their_files(run, object_of, bank):
    first, second, third = Bank.load(bank).names
    told = object_of("remove", bank, first, third)
    assert told["removed"] == [first, third] and told["adapters"] == 1
    assert Bank.load(bank).names == [second]
    assert len(list(bank.glob("*.safetensors"))) == 2
    assert "0 adapters left" in run("remove", bank, second).stdout


def test_a_trained_task_is_added_exactly_and_outlives_the_members_it_stands_on(run, object_of, bank, tmp_path):
    basis = Bank.load(bank).basis(5)
    (name, part), tensors = next(iter(basis.modules.items())), {}
    tensors[f"base_model.model.{name}.eig_coef_A"] = torch.ones(2, part.k[0])
    tensors[f"base_model.model.{name}.eig_coef_B"] = torch.eye(part.k[1], 2)
    config = {"peft_type": "EIGENLORAX", "r": 2, "k": 5, "bank_fingerprint": basis.fingerprint}
    config |= {"bank_members": basis.members, "basis_probe": basis.probe}
    (tmp_path / "task").mkdir()
    save_file(tensors, tmp_path / "task" / "adapter_model.safetensors")
    (tmp_path / "task" / "adapter_config.json").write_text(json.dumps(config))
    (added,) = object_of("add", bank, tmp_path / "task")["added"]
    assert added["error"] == 0
    before = Bank.load(bank).reconstruct("task").factors(name).update()
    assert "Coded task again" in run("remove", bank, "adapter_001").stdout
    torch.testing.assert_close(Bank.load(bank).reconstruct("task").factors(name).update(), before, rtol=0, atol=1e-5)


def test_an_unknown_name_changes_nothing(refused, bank):
    before = (bank / "bank.json").read_bytes()
    names = Bank.load(bank).names
    assert "'nobody'" in refused("remove", bank, names[0], "nobody")
    assert "did you mean" in refused("remove", bank, names[0].upper())
    assert "'nobody'" in refused("rename", bank, "nobody", "x")
    assert "already" in refused("rename", bank, names[0], names[1])
    assert (bank / "bank.json").read_bytes() == before


def test_rename_keeps_the_member(object_of, bank):
    entry = Bank.load(bank)["adapter_000"]
    assert object_of("rename", bank, "adapter_000", "legal") == {"renamed": {"old": "adapter_000", "new": "legal"}}
    assert Bank.load(bank)["legal"] == entry


@pytest.mark.parametrize("name", ["../x", "", "a/b", ".x", "a\nb", "\x1b[2J"])
def test_a_hostile_new_name_is_refused(refused, bank, name):
    assert refused("rename", bank, "adapter_000", name).rstrip("\n").isprintable()


def test_one_name_makes_the_directory_itself_the_adapter(run, fitted, tmp_path):
    assert run("export", fitted, "adapter_000", "-o", tmp_path / "legal").exit_code == 0
    assert LoraAdapter.load(tmp_path / "legal").modules == Bank.load(fitted).reconstruct("adapter_000").modules


@pytest.mark.parametrize(("words", "count"), [(("adapter_000", "adapter_002"), 2), (("--all",), 3)])
def test_several_names_go_below_the_directory(object_of, fitted, tmp_path, words, count):
    told = object_of("export", fitted, *words, "-o", tmp_path / "out")
    assert len(told["exported"]) == count
    for name, path in told["exported"].items():
        assert path == str(tmp_path / "out" / name)
        assert LoraAdapter.load(path).name == name


def test_all_of_one_member_still_goes_below(run, bank, tmp_path):
    run("remove", bank, "adapter_000", "adapter_001")
    assert run("export", bank, "--all", "-o", tmp_path / "out").exit_code == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["adapter_002"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_is_that_of_the_factors(run, family, fitted, tmp_path, dtype):
    assert run("export", fitted, "adapter_000", "-o", tmp_path / "out", "--dtype", dtype).exit_code == 0
    stored = weights(tmp_path / "out")
    assert {t.dtype for key, t in stored.items() if "lora_" in key} == {getattr(torch, dtype)}
    head = "base_model.model.score.weight"
    assert torch.equal(stored[head], weights(family[0])[head])


def test_export_writes_nothing_if_a_name_is_unknown(refused, fitted, tmp_path):
    assert "'nobody'" in refused("export", fitted, "adapter_000", "nobody", "-o", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_export_does_not_replace_other_files(refused, fitted, tmp_path):
    (tmp_path / "a.txt").write_text("keep")
    assert "a.txt" in refused("export", fitted, "adapter_000", "-o", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("words", [(), ("adapter_000", "--all")])
def test_export_wants_names_or_all(run, fitted, tmp_path, words):
    result = run("export", fitted, *words, "-o", tmp_path / "out")
    assert result.exit_code == 2 and "--all" in result.stderr
