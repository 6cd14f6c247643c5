import json
import pickle
import struct
import tracemalloc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from adapterbank.adapters.tensors import DTYPES, TensorDict, TensorFile
from adapterbank.errors import AdapterBankError, AdapterError, MissingFileError

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = ["base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"]


def write(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(3, 5), (), (0, 4), (7,)])
def test_reads_what_safetensors_writes(tmp_path, dtype, shape):
    bits = torch.randint(0, 2, (*shape, dtype.itemsize), dtype=torch.uint8)
    tensor = bits.view(dtype).reshape(shape)
    save_file({"b": torch.ones(3), "a": tensor}, tmp_path / "x.safetensors")
    file = TensorFile(tmp_path / "x.safetensors")
    assert file.entries["a"].shape == shape
    read = file.read("a")
    assert read.dtype == dtype
    assert torch.equal(read.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_an_index_is_small_and_survives_pickling(tmp_path):
    save_file({"a": torch.arange(100_000.0)}, tmp_path / "x.safetensors")
    data = pickle.dumps(TensorFile(tmp_path / "x.safetensors"))
    assert len(data) < 1000
    assert pickle.loads(data).read("a")[-1] == 99_999


def test_the_digest_is_that_of_the_file(tmp_path):
    import hashlib

    save_file({"a": torch.ones(3)}, tmp_path / "x.safetensors")
    expected = hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()
    assert TensorFile(tmp_path / "x.safetensors").digest() == expected


def test_a_file_that_changes_under_us_is_noticed(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(30)}, path)
    file = TensorFile(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(AdapterError, match="changed while it was in use"):
        file.read("a")
    path.unlink()
    for read in (lambda: file.read("a"), file.digest):
        with pytest.raises(AdapterError, match="can't be read any more"):
            read()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MissingFileError, match=r"x\.safetensors does not exist"):
        TensorFile(tmp_path / "x.safetensors")


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "its header is not JSON"),
        (b"\xff", "its header is not JSON"),
        (b"[" * 100_000, "its header is not JSON"),
        (b'{"a": 1, "a": 1}', "a key appears twice"),
        ([], "its header is a list, expected an object"),
        ({"a": 1}, "'a' is described by a int"),
        ({"a": entry(dtype="F4")}, "'a' has dtype 'F4', expected one of F64, F32"),
        ({"a": entry(dtype=[])}, "has dtype"),
        ({"a": entry(shape=[-2])}, "no readable shape"),
        ({"a": entry(shape=[True, 2])}, "no readable shape"),
        ({"a": entry(shape=[2**70])}, "no readable shape"),
        ({"a": entry(shape=[1] * 17)}, "no readable shape"),
        ({"a": entry(shape="2")}, "no readable shape"),
        ({"a": entry(offsets=[0])}, "no readable shape"),
        ({"a": entry(offsets=[-8, 0])}, "no readable shape"),
        ({"a": entry(offsets=[8, 0])}, "would end at byte"),
        ({"a": entry(shape=[2**40], offsets=[0, 2**42])}, "would end at byte .* promises too much"),
        ({"a": entry(shape=[2**40])}, "does not take 8 bytes"),
        ({"a": entry(), "b": entry(offsets=[4, 12])}, "'b' overlaps another one"),
        ({"a\n": entry()}, "is no tensor name"),
        ({"\ud800": entry()}, "is no tensor name"),
        ({"a" * 513: entry()}, "is no tensor name"),
    ],
)
def test_hostile_headers_are_refused_in_words(tmp_path, header, message):
    with pytest.raises(AdapterError, match=message):
        TensorFile(write(tmp_path / "x.safetensors", header, bytes(12)))


def test_a_header_longer_than_the_file_is_not_allocated(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    tracemalloc.start()
    try:
        with pytest.raises(AdapterError, match="its header would take 4611686018427387904 bytes and the file holds 10"):
            TensorFile(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", range(0, 300, 7))
def test_every_truncation_is_refused(tmp_path, size):
    whole = save({name: torch.ones(4, 4) for name in NAMES})
    path = tmp_path / "x.safetensors"
    path.write_bytes(whole[:size])
    with pytest.raises(AdapterError):
        TensorFile(path)


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
sizes = st.integers(-2, 70) | st.integers()
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPES, "F4", ""]) | junk,
        "shape": st.lists(sizes, max_size=3) | junk,
        "data_offsets": st.lists(sizes, min_size=2, max_size=2) | junk,
    },
)


@quick
@given(header=st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=6), entries | junk, max_size=4) | junk)
def test_any_header_either_reads_or_is_refused(tmp_path, header):
    path = write(tmp_path / "x.safetensors", header, bytes(64))
    try:
        file = TensorFile(path)
        for name, found in file.entries.items():
            assert found.stop <= path.stat().st_size
            file.read(name)
    except AdapterBankError as error:
        assert str(path) in str(error)


@quick
@given(data=st.binary(max_size=200), at=st.integers(0, 250), whole=st.booleans())
def test_any_bytes_either_read_or_are_refused(tmp_path, data, at, whole):
    good = bytearray(save({name: torch.ones(4, 4) for name in NAMES}))
    good[at : at + len(data)] = data
    path = tmp_path / "x.safetensors"
    path.write_bytes(bytes(good) if whole else data)
    try:
        file = TensorFile(path)
        for name in file.entries:
            file.read(name)
    except AdapterBankError:
        pass


def test_a_dict_reads_copies_and_hashes_values_not_order():
    tensors = {"b": torch.ones(2, dtype=torch.bfloat16), "a": torch.zeros(2, 3).T}
    source = TensorDict(tensors)
    source.read("b").zero_()
    assert tensors["b"].sum() == 2
    assert source.size == 4 + 24
    assert source.digest() == TensorDict(dict(reversed(tensors.items()))).digest()
    assert source.digest() != TensorDict(tensors | {"a": torch.ones(3)}).digest()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1, "is a int, expected a tensor"),
        (torch.ones(2, device="meta"), "not a dense"),
        (torch.eye(2).to_sparse(), "not a dense"),
    ],
)
def test_a_dict_refuses_what_has_no_values(value, message):
    with pytest.raises(AdapterError, match=message):
        TensorDict({"a": value})
