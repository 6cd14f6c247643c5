import pytest

from adapterbank.adapters import base_model_id, check_name, match_modules
from adapterbank.errors import AdapterError


@pytest.mark.parametrize("name", ["a", "law-2.1_x", "0", "A" * 128])
def test_ordinary_names_pass(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "-a", "_a", "a/b", "a\\b", "a b", "a\n", "\x00", "é", "A" * 129, "../a"]
)
def test_names_that_could_be_paths_or_break_a_table_are_refused(name):
    with pytest.raises(AdapterError, match="give one as NAME=PATH"):
        check_name(name)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("org/name", "org/name"),
        ("t5-large", "t5-large"),
        ("/home/me/models/llama", "llama"),
        ("/home/me/models/llama/", "llama"),
        ("~/models/llama", "llama"),
        ("./llama", "llama"),
        ("../../llama", "llama"),
        ("models/mine/llama", "llama"),
        (r"C:\Users\me\llama", "llama"),
        ("D:/llama", "llama"),
        ("/c/hub/models--org--some--name/snapshots/0123abc", "org/some--name"),
        ("~", None),
        ("", None),
        (None, None),
    ],
)
def test_paths_of_a_base_model_become_their_last_part(value, expected):
    assert base_model_id(value) == expected


def test_an_existing_directory_is_a_path_even_if_it_looks_like_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "llama").mkdir(parents=True)
    assert base_model_id("me/llama") == "llama"


def test_modules_match_by_the_longest_common_end():
    present = ["encoder.layer.0.query", "encoder.layer.1.query", "pooler"]
    assert match_modules(["bert.encoder.layer.1.query", "pooler", "bert.decoder.layer.0.query"], present) == {
        "bert.encoder.layer.1.query": "encoder.layer.1.query",
        "pooler": "pooler",
    }
    assert match_modules(["layer.0.query"], present) == {"layer.0.query": "encoder.layer.0.query"}


def test_one_common_part_is_no_match():
    assert match_modules(["bert.query"], ["query"]) == {}


def test_a_name_that_fits_two_modules_is_refused():
    with pytest.raises(AdapterError, match=r"fits 2 modules of the model: decoder\.0\.q, encoder\.0\.q"):
        match_modules(["0.q"], ["encoder.0.q", "decoder.0.q"])
