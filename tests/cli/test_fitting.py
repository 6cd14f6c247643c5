"""fit, add and absorb: what they write, what they say, and what bad input leaves behind: nothing."""

import shutil

import pytest

from adapterbank import Bank, LoraAdapter
from adapterbank.bank import store
from families import CORRUPTIONS, corrupt, make_family


def files_below(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# --- what is written ------------------------------------------------------------------------------------------------


def test_fit_writes_the_bank_that_it_shows(run, family, tmp_path):
    result = run("fit", *family, "-o", tmp_path / "deep" / "bank", "--max-error", 0.1)
    assert result.exit_code == 0 and result.stderr == ""
    bank = Bank.load(tmp_path / "deep" / "bank")
    assert bank.names == [path.name for path in family]
    for name in bank.names:
        (line,) = [line for line in result.stdout.splitlines() if f" {name} " in line]
        assert f"{bank[name].bytes:,}" in line and f"{bank[name].error:.4f}" in line
    assert f"{bank.bytes:,}" in result.stdout


@pytest.mark.parametrize(
    ("options", "holds"),
    [
        (("--ratio", 3), lambda bank: bank.summary()["ratio"] >= 3),
        (("--budget", "3.0kB"), lambda bank: bank.bytes <= 3000),
        (("--max-error", 0.1), lambda bank: max(bank.errors().values()) <= 0.1),
        ((), lambda bank: max(bank.errors().values()) <= 0.05),
        (("-k", 3), lambda bank: set(bank.directions().values()) == {(3, 3)}),
        (("-k", 8, "--no-quantize"), lambda bank: max(bank.errors().values()) < 1e-5),
        (("-k", 5, "--method", "eigenlora", "--mean", "drop"), lambda bank: bank.index.parameters["mean"] == "drop"),
        (("-k", 2, "--method", "flat", "--balance"), lambda bank: bank.index.parameters["balance"] is True),
        (("--base", "my/base"), lambda bank: bank.index.base == "my/base"),
    ],
)
def test_options_reach_the_fit(run, family, tmp_path, options, holds):
    result = run("fit", *family, "-o", tmp_path / "bank", *options)
    assert result.exit_code == 0, result.output
    assert holds(Bank.load(tmp_path / "bank"))


def test_the_same_seed_gives_the_same_files(run, family, tmp_path):
    for out in ("one", "two"):
        assert run("fit", *family, "-o", tmp_path / out, "--seed", 3).exit_code == 0
    files = [{p.name: p.read_bytes() for p in (tmp_path / out).iterdir()} for out in ("one", "two")]
    assert files[0] == files[1]


def test_fit_as_json_tells_everything(object_of, family, tmp_path):
    told = object_of("fit", *family, "-o", tmp_path / "bank", "--max-error", 0.1)
    bank = Bank.load(tmp_path / "bank")
    assert told["bytes"] == bank.bytes and told["bank"] == str(tmp_path / "bank") and told["refused"] == []
    assert {m["name"]: m["error"] for m in told["members"]} == bank.errors()
    assert set(told["advice"]) == {"pays", "saving", "only_start", "text"}


def test_advice_stands_at_the_end_only_where_sharing_does_not_pay(run, family, tmp_path):
    unrelated = make_family(tmp_path / "far", n=2, rank=2, hidden=32, layers=1, modules=("q",), shared_rank=32)
    result = run("fit", *unrelated, "-o", tmp_path / "far-bank", "--max-error", 0.1)
    assert "Sharing does not pay here" in result.stdout.splitlines()[-1]
    related = make_family(
        tmp_path / "near", n=8, rank=2, hidden=64, layers=1, modules=("q",), shared_rank=2, noise=0.01
    )
    result = run("fit", *related, "-o", tmp_path / "near-bank", "--max-error", 0.1)
    assert "pay" not in result.stdout


def test_many_adapters_are_summed_up_by_the_worst(run, tmp_path):
    paths = make_family(tmp_path / "many", n=41, rank=1, hidden=8, layers=1, modules=("q",), shared_rank=2)
    result = run("fit", *paths, "-o", tmp_path / "bank", "--max-error", 0.3)
    assert "the 10 of 41 adapters with the largest errors" in result.stdout
    shown = [line for line in result.stdout.splitlines() if "adapter_0" in line]
    errors = sorted(Bank.load(tmp_path / "bank").errors().values(), reverse=True)
    assert len(shown) == 10 and all(f"{error:.4f}" in line for error, line in zip(errors, shown, strict=False))


# --- names ----------------------------------------------------------------------------------------------------------


def test_name_equals_path_renames(object_of, family, tmp_path):
    told = object_of("fit", f"law={family[0]}", f"med={family[1]}", "-o", tmp_path / "bank")
    assert [m["name"] for m in told["members"]] == ["law", "med"]


def test_a_path_that_holds_an_equals_sign_is_a_path(object_of, family, tmp_path):
    odd = shutil.copytree(family[0], tmp_path / "lr=3" / "final")
    told = object_of("fit", odd, f"named={odd}", "-o", tmp_path / "bank")
    assert [m["name"] for m in told["members"]] == ["final", "named"]


def test_the_same_name_twice_is_an_error_that_says_so(refused, family, tmp_path):
    other = shutil.copytree(family[1], tmp_path / "other" / family[0].name.upper())
    assert "two adapters are named" in refused("fit", family[0], other, "-o", tmp_path / "bank")
    assert "NAME=PATH" in refused("fit", f"a={family[0]}", f"A={family[1]}", "-o", tmp_path / "bank")
    assert not (tmp_path / "bank").exists()


@pytest.mark.parametrize(
    "name", ["../../evil", "/etc/x", ".hidden", "a/b", "a b", "", "x" * 129, "é", "\x1b[31mred", "a\nb"]
)
def test_a_hostile_name_is_refused_on_one_clean_line(refused, family, tmp_path, name):
    line = refused("fit", f"{name}={family[0]}", "-o", tmp_path / "bank")
    assert line.rstrip("\n").isprintable()
    assert list(tmp_path.iterdir()) == []


# --- bad input ------------------------------------------------------------------------------------------------------

GOOD = {"zero"}
REASONS = {
    "truncated": "cut short", "nan": "not finite", "inf": "not finite", "shape": "64", "base": "other/base",
    "missing_b": "lora_B", "not_lora": "IA3", "badjson": "adapter_config.json", "transposed": "",
    "noconfig": "adapter_config.json", "extra": "embedding", "dora": "DoRA", "pickle": "pickle", "promise": "",
}  # fmt: skip


@pytest.mark.parametrize("kind", [kind for kind in CORRUPTIONS if kind not in GOOD])
def test_a_bad_adapter_is_one_line_and_leaves_nothing(refused, family, tmp_path, kind):
    bad = corrupt(family[3], kind, tmp_path / "in" / "bad")
    line = refused("fit", *family[:3], bad, "-o", tmp_path / "out" / "bank")
    assert "bad" in line and REASONS[kind].lower() in line.lower()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["add", "absorb"])
@pytest.mark.parametrize("kind", ["truncated", "nan", "shape", "base", "dora"])
def test_a_bad_adapter_leaves_the_bank_as_it_was(refused, family, bank, tmp_path, command, kind):
    before = {p.name: p.read_bytes() for p in bank.iterdir()}
    bad = corrupt(family[3], kind, tmp_path / "in" / "bad")
    assert "bad" in refused(command, bank, bad)
    assert {p.name: p.read_bytes() for p in bank.iterdir() if p.name in before or p.name != ".lock"} == before


def test_skip_bad_fits_the_rest_and_lists_what_was_left_out(run, object_of, family, tmp_path):
    bad = [corrupt(family[3], kind, tmp_path / "in" / kind) for kind in CORRUPTIONS if kind not in GOOD]
    told = object_of("fit", *family[:3], *bad, tmp_path / "nothing", "-o", tmp_path / "bank", "--skip-bad")
    assert [m["name"] for m in told["members"]] == [path.name for path in family[:3]]
    assert len(told["refused"]) == len(bad) + 1 and all(r["reason"] for r in told["refused"])
    result = run("fit", *family[:3], *bad[:2], "-o", tmp_path / "bank", "--skip-bad", "--force")
    assert "Left out 2 adapters:" in result.stdout and "nan" in result.stdout.splitlines()[-1]


def test_skip_bad_with_nothing_left_is_an_error(refused, family, tmp_path):
    bad = corrupt(family[0], "nan", tmp_path / "bad")
    assert "no adapter to fit" in refused("fit", bad, "-o", tmp_path / "bank", "--skip-bad")
    assert not (tmp_path / "bank").exists()


def test_a_missing_adapter_and_an_empty_directory_are_named(refused, family, tmp_path):
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "nothing") in refused("fit", family[0], tmp_path / "nothing", "-o", tmp_path / "bank")
    assert "empty" in refused("fit", family[0], tmp_path / "empty", "-o", tmp_path / "bank")
    assert files_below(tmp_path) == ["empty"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--ratio", 4, "--budget", "1MB"), "give one target"),
        (("--budget", "20 parsecs"), "no size"),
        (("--ratio", -1), "positive"),
        (("--max-error", "nan"), "positive"),
        (("-k", 0), "at least 1"),
        (("-k", 1000), "rank 6"),
        (("--ratio", 100000), "can't hold"),
        (("--method", "flat"), "needs k"),
    ],
)
def test_contradictions_are_errors_and_write_nothing(refused, family, tmp_path, options, reason):
    assert reason in refused("fit", *family[:3], "-o", tmp_path / "bank", *options)
    assert list(tmp_path.iterdir()) == []


# --- what is there already ------------------------------------------------------------------------------------------


def test_fit_replaces_a_bank_only_when_told_to(run, refused, family, bank):
    before = bank.joinpath("bank.json").read_bytes()
    assert "--force" in refused("fit", *family, "-o", bank)
    assert bank.joinpath("bank.json").read_bytes() == before
    assert run("fit", *family, "-o", bank, "--force").exit_code == 0
    assert Bank.load(bank).names == [path.name for path in family]
    assert len([p for p in bank.iterdir() if p.suffix == ".safetensors"]) == 5


def test_a_failed_fit_with_force_keeps_the_old_bank(refused, family, bank, tmp_path):
    before = {p.name: p.read_bytes() for p in bank.iterdir()}
    refused("fit", *family, corrupt(family[0], "nan", tmp_path / "bad"), "-o", bank, "--force")
    assert {p.name: p.read_bytes() for p in bank.iterdir()} == before


def test_other_peoples_files_are_not_touched(refused, family, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    assert "'a.txt'" in refused("fit", *family, "-o", tmp_path / "notes", "--force")
    assert "is a file" in refused("fit", *family, "-o", tmp_path / "file")
    assert files_below(tmp_path) == ["file", "notes", "notes/a.txt"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError("disk full")])
@pytest.mark.parametrize("there", [False, True])
def test_a_save_that_fails_leaves_nothing_behind(run, family, tmp_path, monkeypatch, failure, there):
    out = tmp_path / "deep" / "bank"
    if there:
        out.mkdir(parents=True)

    def fail(directory, index):
        raise failure

    monkeypatch.setattr(store, "commit", fail)
    result = run("fit", *family[:2], "-o", out)
    assert result.exit_code == (130 if failure is KeyboardInterrupt else 1)
    assert result.stderr.count("\n") == 1
    assert files_below(tmp_path) == (["deep", "deep/bank"] if there else [])


def test_an_interrupt_during_the_fit_is_exit_code_130(run, family, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Bank, "fit", interrupted)
    result = run("fit", *family, "-o", tmp_path / "bank")
    assert (result.exit_code, result.stderr) == (130, "Interrupted.\n")
    assert list(tmp_path.iterdir()) == []


# --- add and absorb -------------------------------------------------------------------------------------------------


def test_add_codes_beside_the_others(run, object_of, family, bank):
    told = object_of("add", bank, f"new={family[3]}")
    assert [m["name"] for m in told["added"]] == ["new"] and told["refused"] == []
    assert Bank.load(bank)["new"].error == told["added"][0]["error"] <= 0.1
    assert "again" in run("add", bank, f"again={family[3]}").stdout


def test_add_keeps_a_promise_of_its_own(object_of, family, bank):
    told = object_of("add", bank, f"new={family[3]}", "--max-error", "0.01")
    assert told["added"][0]["error"] <= 0.01


def test_add_refuses_a_name_that_is_taken(refused, family, bank):
    assert "NAME=PATH" in refused("add", bank, family[0])
    assert Bank.load(bank).names == [path.name for path in family[:3]]


def test_add_skips_bad_ones_and_lists_them(run, family, bank, tmp_path):
    bad = corrupt(family[0], "inf", tmp_path / "bad")
    result = run("add", bank, bad, family[3], "--skip-bad")
    assert result.exit_code == 0 and "Left out 1 adapter:" in result.stdout
    assert Bank.load(bank).names[-1] == family[3].name


def test_absorb_fits_again_with_the_new_one(object_of, run, family, bank):
    told = object_of("absorb", bank, family[3])
    assert [m["name"] for m in told["members"]] == [path.name for path in family]
    assert [m["bound"] for m in told["members"]] == [True, True, True, False]


def test_absorb_takes_old_members_from_their_originals(object_of, run, family, bank):
    originals = [word for path in family[:3] for word in ("--original", path)]
    told = object_of("absorb", bank, family[3], *originals)
    assert not any(m["bound"] for m in told["members"]) and told["largest_error"] <= 0.1


def test_absorb_shows_bounds_as_bounds(run, family, bank):
    result = run("absorb", bank, family[3])
    assert result.exit_code == 0 and result.stdout.count("≤") == 5


def test_a_pickle_is_read_only_when_allowed(run, refused, family, tmp_path):
    import torch
    from safetensors.torch import load_file

    old = shutil.copytree(family[0], tmp_path / "old")
    torch.save(load_file(old / "adapter_model.safetensors"), old / "adapter_model.bin")
    (old / "adapter_model.safetensors").unlink()
    assert "pickle" in refused("fit", old, "-o", tmp_path / "bank")
    assert run("fit", old, "-o", tmp_path / "bank", "--allow-pickle").exit_code == 0
    assert LoraAdapter.load(old, allow_pickle=True).modules == Bank.load(tmp_path / "bank").reconstruct("old").modules
