"""info, diagnose and verify: they change nothing and tell the truth."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from adapterbank import Bank
from families import corrupt, make_family


def test_info_shows_every_member_and_writes_nothing(run, object_of, fitted):
    before = sorted(p.name for p in fitted.iterdir())
    result = run("info", fitted)
    bank = Bank.load(fitted)
    assert result.exit_code == 0 and all(name in result.stdout for name in bank.names)
    told = object_of("info", fitted)
    assert told["bytes"] == bank.bytes and told["error"] == bank.summary()["error"]
    assert [m["name"] for m in told["members"]] == bank.names
    assert sorted(p.name for p in fitted.iterdir()) == before


def test_info_counts_the_bytes_that_are_on_disk(object_of, tmp_path, run):
    paths = make_family(tmp_path / "in", n=2, rank=1, hidden=32, layers=1, shared_rank=4)
    assert run("fit", *paths, "-o", tmp_path / "bank").exit_code == 0
    on_disk = sum(p.stat().st_size for p in (tmp_path / "bank").iterdir())
    assert object_of("info", tmp_path / "bank")["bytes"] == on_disk


def test_markup_in_a_name_of_a_base_is_text(run, family, tmp_path):
    assert run("fit", *family, "-o", tmp_path / "bank", "--base", "org/[red]x").exit_code == 0
    assert "org/[red]x" in run("info", tmp_path / "bank").stdout


@pytest.mark.parametrize("command", ["info", "verify", "add", "remove", "absorb", "export", "rename"])
def test_a_missing_bank_is_one_line_and_makes_no_directory(refused, family, tmp_path, command):
    rest = {"info": (), "remove": ("a",), "rename": ("a", "b"), "export": ("a", "-o", tmp_path / "x")}
    line = refused(command, tmp_path / "no", *rest.get(command, (family[0],)))
    assert "no bank.json" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 99}', '{"format": 1}', '{"format": 1, "members": {"../x": {}}}']
)
def test_a_damaged_index_is_one_line(refused, bank, text):
    (bank / "bank.json").write_text(text)
    assert "bank.json" in refused("info", bank)


def test_a_damaged_file_is_one_line(refused, bank):
    for path in bank.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    assert "damaged" in refused("info", bank)


def test_verify_finds_what_was_recorded(run, object_of, family, fitted):
    told = object_of("verify", fitted, *family[:3])
    assert told["ok"] and all(m["ok"] for m in told["members"])
    for m in told["members"]:
        assert m["error"] == pytest.approx(m["recorded"], rel=1e-4)
    result = run("verify", fitted, family[0])
    assert result.exit_code == 0 and "Not compared: 2 other members." in result.stdout


def test_verify_ends_with_exit_code_1_if_one_is_worse(run, family, fitted, tmp_path):
    changed = shutil.copytree(family[0], tmp_path / family[0].name)
    weights = changed / "adapter_model.safetensors"
    save_file({key: 1.5 * t if "lora_A" in key else t for key, t in load_file(weights).items()}, weights)
    result = run("verify", fitted, changed, family[1])
    assert result.exit_code == 1 and "worse" in result.stdout
    assert result.stderr == f"Error: worse than recorded: {family[0].name}; keep the originals\n"
    result = run("verify", fitted, changed, family[1], "--json")
    told = json.loads(result.stdout)
    assert (result.exit_code, told["ok"], [m["ok"] for m in told["members"]]) == (1, False, [False, True])


def test_verify_compares_by_name(refused, run, family, fitted):
    assert run("verify", fitted, f"{family[0].name}={family[0]}").exit_code == 0
    assert "has no member 'x'" in refused("verify", fitted, f"x={family[0]}")
    assert "adapter_003" in refused("verify", fitted, family[3])


@pytest.fixture
def few(monkeypatch):
    """Only the errors that the sentence quotes."""
    monkeypatch.setattr("adapterbank.bank.diagnose.TARGETS", (0.05, 0.2))


def test_diagnose_prints_tables_and_one_sentence(run, family, few):
    result = run("diagnose", *family)
    assert result.exit_code == 0 and result.stderr == ""
    assert "Bytes at the same error" in result.stdout and "svd+int4" in result.stdout
    assert "Examined 4 of 4 adapters and 1 of 1 modules" in result.stdout
    assert "pay" in result.stdout.splitlines()[-1]


def test_diagnose_as_json_is_one_object(object_of, family, few):
    told = object_of("diagnose", *family[:2], "-k", 2)
    assert told["k"] == 2 and told["adapters"] == [path.name for path in family[:2]]


def test_diagnose_refuses_and_skips_like_a_fit(refused, object_of, family, tmp_path, few):
    bad = corrupt(family[0], "nan", tmp_path / "bad")
    assert "adapter 'bad'" in refused("diagnose", *family[:2], bad)
    told = object_of("diagnose", *family[:2], bad, "--skip-bad")
    assert len(told["adapters"]) == 2 and len(told["refused"]) == 1
