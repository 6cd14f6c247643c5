"""Switching in a model's own files."""

import json
import math
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterbank.errors import AdapterError, MissingFileError
from adapterbank.shira import model_files
from adapterbank.shira.model_files import STATE, active_in, copy_model, switch_files
from sparse import Net, make_delta


@pytest.fixture(params=["one file", "shards"])
def folder(tmp_path, request):
    """A model on disk, in float16."""
    state = {name: tensor.half() for name, tensor in Net().state_dict().items()}
    out = tmp_path / "model"
    out.mkdir()
    if request.param == "one file":
        save_file(state, out / "model.safetensors")
    else:
        where = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(state)}
        for file in set(where.values()):
            save_file({name: state[name] for name in state if where[name] == file}, out / file)
        (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return out


def weights_of(folder):
    return {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != model_files.LOCK}


def delta_of(seed, **fields):
    return make_delta(Net().half(), seed=seed, name=f"a{seed}", **fields)


def test_the_files_hold_what_the_model_in_memory_would(folder):
    before = contents(folder)
    model = Net().half()
    saved = delta_of(0).apply_(model, alpha=0.5)
    assert switch_files(folder, delta_of(0), alpha=0.5) is None
    found = weights_of(folder)
    assert all(torch.equal(tensor, found[name]) for name, tensor in model.state_dict().items())
    delta_of(0).restore_(model, saved)
    delta_of(1).apply_(model)
    assert switch_files(folder, delta_of(1)) == "a0" and active_in(folder) == "a1"
    found = weights_of(folder)
    assert all(torch.equal(tensor, found[name]) for name, tensor in model.state_dict().items())
    assert switch_files(folder, None) == "a1" and active_in(folder) is None
    assert contents(folder) == before
    assert switch_files(folder, None) is None and contents(folder) == before


def test_an_adapter_of_another_base_leaves_the_files_as_they_were(folder):
    stranger = make_delta(Net(seed=5).half())
    for put_in in (None, delta_of(0)):
        switch_files(folder, put_in)
        before = contents(folder)
        with pytest.raises(AdapterError, match="has other values than the base model"):
            switch_files(folder, stranger)
        assert contents(folder) == before


@pytest.mark.parametrize("step", range(9))
def test_a_switch_that_is_cut_off_can_be_taken_back(folder, monkeypatch, step):
    before, left = contents(folder), [step]

    def cut_off(whole):
        def call(*args, **options):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return whole(*args, **options)

        return call

    switch_files(folder, delta_of(0))
    # of the nine writes: two take a0 out, the state is replaced between two flushes, two put a1 in
    for name in ("put_", "replace_file"):
        monkeypatch.setattr(model_files, name, cut_off(getattr(model_files, name)))
    monkeypatch.setattr(model_files._Flush, "__call__", cut_off(model_files._Flush.__call__))
    try:
        switch_files(folder, delta_of(1))
    except KeyboardInterrupt:
        assert step < 7
    monkeypatch.undo()
    switch_files(folder, None)
    assert contents(folder) == before


def test_files_that_somebody_else_changed_are_not_spoiled(folder):
    base = contents(folder)
    switch_files(folder, delta_of(0))
    for name, data in contents(folder).items():
        if name.endswith(".safetensors"):
            (folder / name).write_bytes(data[:-64] + bytes(64))
    path = next(path for path in folder.glob("*.safetensors") if "first.weight" in load_file(path))
    tensors = load_file(path)
    save_file({**tensors, "first.weight": tensors["first.weight"] + 1}, path)
    before = contents(folder)
    for delta in (None, delta_of(1)):
        with pytest.raises(AdapterError, match=r"first\.weight was changed since 'a0' was put in"):
            switch_files(folder, delta)
    assert contents(folder) == before
    (folder / STATE).write_bytes(base[path.name])
    with pytest.raises(AdapterError, match="is damaged"):
        active_in(folder)


def test_values_that_are_no_numbers_come_back_too(folder):
    model = Net().half()
    delta = delta_of(0)
    position = int(delta.updates["first.weight"].positions[2])
    model.first.weight.data.view(-1)[position] = float("nan")
    path = next(path for path in folder.glob("*.safetensors") if "first.weight" in load_file(path))
    save_file({**load_file(path), "first.weight": model.first.weight.data}, path)
    before = contents(folder)
    switch_files(folder, delta, check=False)
    assert switch_files(folder, None) == "a0"
    assert contents(folder) == before


@pytest.mark.parametrize("alpha", [math.nan, math.inf])
def test_a_strength_that_is_no_number_is_refused(folder, alpha):
    before = contents(folder)
    with pytest.raises(AdapterError, match=f"alpha={alpha} is no strength; give a finite number"):
        switch_files(folder, delta_of(0), alpha=alpha)
    assert contents(folder) == before


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_a_copy_that_is_cut_off_leaves_nothing(folder, tmp_path, monkeypatch, error):
    def cut_off(source, target, **_):
        raise error

    monkeypatch.setattr(shutil, "copystat", cut_off)  # the last thing that copying a directory does
    with pytest.raises((AdapterError, KeyboardInterrupt)):
        copy_model(folder, tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("positions", lambda t: t.float(), "is damaged"),
        ("positions", lambda t: t[1:], "is damaged"),
        ("base", lambda t: t.float(), "is damaged"),
        ("new", lambda t: t.to(torch.int16), "is damaged"),
        ("positions", lambda t: t + 10**6, "was changed since 'a0' was put in"),
        ("positions", lambda t: t - 10**6, "was changed since 'a0' was put in"),
    ],
)
def test_a_damaged_state_is_one_clear_error_and_changes_nothing(folder, part, change, message):
    switch_files(folder, delta_of(0))
    state = load_file(folder / STATE)
    save_file({**state, f"{part}.first.weight": change(state[f"{part}.first.weight"]).contiguous()}, folder / STATE)
    before = contents(folder)
    for delta in (None, delta_of(1)):
        with pytest.raises(AdapterError, match=message):
            switch_files(folder, delta)
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["../model.safetensors", "/tmp/model.safetensors", 7])
def test_an_index_leads_nowhere_else(folder, tmp_path, name):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"first.weight": name}}))
    with pytest.raises(AdapterError, match="which is no file beside it"):
        switch_files(folder, delta_of(0))


def test_links_are_refused_and_copies_are_files(folder, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in folder.iterdir():
        os.symlink(path, linked / path.name)
    with pytest.raises(AdapterError, match="is a link, and others may use what it leads to"):
        switch_files(linked, delta_of(0))
    before = contents(folder)
    copy_model(linked, tmp_path / "copy")
    switch_files(tmp_path / "copy", delta_of(0))
    assert contents(folder) == before and active_in(tmp_path / "copy") == "a0"
    with pytest.raises(AdapterError, match="exists; give a new directory"):
        copy_model(folder, tmp_path / "copy")


def test_what_is_no_model_is_refused(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    for call in (
        lambda: switch_files(tmp_path / "empty", None),
        lambda: copy_model(tmp_path / "empty", tmp_path / "x"),
    ):
        with pytest.raises(MissingFileError, match="holds no model in safetensors files"):
            call()
    assert not any((tmp_path / "empty").iterdir()) and not (tmp_path / "x").exists()
    for path in folder.glob("*.index.json"):
        path.unlink()
    shutil.copy(next(folder.glob("*.safetensors")), folder / "other.safetensors")
    with pytest.raises(AdapterError, match="two files hold"):
        switch_files(folder, None)
