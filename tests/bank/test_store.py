import os

import pytest
import torch

from adapterbank.bank import store
from adapterbank.errors import BankError, MissingFileError

DATA, DIGEST = store.serialise({"payload": torch.arange(5, dtype=torch.uint8)})
NAME = store.member_file(DIGEST)


def test_files_are_named_by_their_content():
    assert f"{DIGEST[:16]}.safetensors" == NAME
    assert store.basis_file(DIGEST) == f"basis-{DIGEST[:16]}.safetensors"
    assert store.serialise({"payload": torch.arange(5, dtype=torch.uint8)}) == (DATA, DIGEST)


def test_a_file_is_read_as_written(tmp_path):
    store.write_file(tmp_path, NAME, DATA, DIGEST)
    assert [p.name for p in tmp_path.iterdir()] == [NAME]
    assert store.read_file(tmp_path, NAME, DIGEST)["payload"].tolist() == [0, 1, 2, 3, 4]


def test_a_whole_file_is_not_written_again_and_a_damaged_one_is(tmp_path):
    store.write_file(tmp_path, NAME, DATA, DIGEST)
    before = (tmp_path / NAME).stat().st_ino
    store.write_file(tmp_path, NAME, DATA, DIGEST)
    assert (tmp_path / NAME).stat().st_ino == before
    (tmp_path / NAME).write_bytes(DATA[:-1])
    store.write_file(tmp_path, NAME, DATA, DIGEST)
    assert (tmp_path / NAME).read_bytes() == DATA


@pytest.mark.parametrize("place", [0, 9, len(DATA) - 1])
def test_any_flipped_byte_is_found(tmp_path, place):
    spoilt = bytearray(DATA)
    spoilt[place] ^= 1
    (tmp_path / NAME).write_bytes(spoilt)
    with pytest.raises(BankError, match="is damaged: its sha256"):
        store.read_file(tmp_path, NAME, DIGEST)


def test_a_missing_file_says_that_the_bank_may_have_changed(tmp_path):
    with pytest.raises(MissingFileError, match="load it again"):
        store.read_file(tmp_path, NAME, DIGEST)


def test_a_directory_in_the_place_of_a_file_is_a_bank_error(tmp_path):
    (tmp_path / NAME).mkdir()
    with pytest.raises(BankError, match="can't be read"):
        store.read_file(tmp_path, NAME, DIGEST)


def test_a_file_of_the_right_hash_that_is_no_safetensors_is_refused(tmp_path):
    import hashlib

    (tmp_path / "x").write_bytes(b"junk")
    with pytest.raises(BankError, match="no safetensors file"):
        store.read_file(tmp_path, "x", hashlib.sha256(b"junk").hexdigest())


def test_a_failing_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(BankError, match="No space left"):
        store.write_file(tmp_path, NAME, DATA, DIGEST)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_of_something_else_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(BankError, match=r"holds 'thesis\.tex' and no bank"), store.locked(tmp_path):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_place_of_the_directory_is_a_bank_error(tmp_path):
    (tmp_path / "bank").write_text("")
    with pytest.raises(BankError, match="can't be written to"), store.locked(tmp_path / "bank"):
        pass
    with pytest.raises(MissingFileError, match="give the directory of a bank"):
        store.read_index(tmp_path / "bank")


def test_the_lock_is_free_again_after_an_error(tmp_path):
    with pytest.raises(KeyError), store.locked(tmp_path):
        raise KeyError
    with store.locked(tmp_path):
        pass


def test_an_index_that_is_no_text_is_a_bank_error(tmp_path):
    (tmp_path / store.INDEX).write_bytes(b"\xff\xfe")
    with pytest.raises(BankError, match="can't be read"):
        store.read_index(tmp_path)
