import contextlib
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterbank.bank import BankIndex, MemberEntry, ModuleEntry
from adapterbank.bank.index import FORMAT
from adapterbank.errors import BankError

MEMBER = MemberEntry(
    sha256="a" * 64, source="b" * 16, source_bytes=4096, values=1024, bytes=700, r=4, alpha=8.0, scales=(2.0, 1.0),
    config=0, error=0.05,
)  # fmt: skip
INDEX = BankIndex(
    method="product", coding="predictive", parameters={"ratio": 8.0}, slope=1.5e-7, base="org/base", basis="c" * 64,
    basis_bytes=900, modules=(ModuleEntry(name="layers.0.q", d_in=64, d_out=32),), configs=({"task_type": "SEQ_CLS"},),
    members={"law": MEMBER, "tax": replace(MEMBER, bound=True)},
)  # fmt: skip


def test_an_index_survives_json():
    assert BankIndex.from_json(INDEX.to_json(), "bank.json") == INDEX


def test_an_empty_index_survives_json():
    empty = replace(INDEX, members={}, configs=(), modules=(), base=None)
    assert BankIndex.from_json(empty.to_json(), "bank.json") == empty


def test_each_member_has_a_line_of_its_own():
    lines = INDEX.to_json().splitlines()
    assert sum(line.startswith('"law":') for line in lines) == 1
    assert sum(line.startswith('"tax":') for line in lines) == 1


def test_a_newer_format_is_refused_by_its_number():
    text = INDEX.to_json().replace(f'"format":{FORMAT}', '"format":99')
    with pytest.raises(BankError, match="format 99, this version reads up to 1; upgrade"):
        BankIndex.from_json(text, "bank.json")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", '{"a":1}', '{"format":true}', '{"format":0}', "[" * 10**5]
)
def test_what_is_no_index_is_refused(text):
    with pytest.raises(BankError, match=r"bank\.json is no "):
        BankIndex.from_json(text, "bank.json")


def damaged(path, value):
    data = json.loads(INDEX.to_json())
    at = data
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("method",), "pca"),
        (("coding",), ["int16"]),
        (("slope",), "fast"),
        (("slope",), float("nan")),
        (("base",), 5),
        (("basis",), "../../etc/passwd"),
        (("basis",), "C" * 64),
        (("basis_bytes",), -1),
        (("parameters",), 3),
        (("modules",), [["q", 0, 4]]),
        (("modules",), [["q", 2**40, 4]]),
        (("modules",), [["q", True, 4]]),
        (("modules",), [["q", 4, 4], ["q", 4, 4]]),
        (("modules",), ["q"]),
        (("configs",), [5]),
        (("members",), []),
        (("members", "law", "sha256"), "../secret"),
        (("members", "law", "sha256"), "a" * 63 + "\n"),
        (("members", "law", "values"), 1e3),
        (("members", "law", "values"), -4),
        (("members", "law", "error"), None),
        (("members", "law", "scales"), [float("inf")]),
        (("members", "law", "scales"), 2.0),
        (("members", "law", "config"), 1),
        (("members", "law", "config"), -1),
        (("members", "law", "path"), "/etc/passwd"),
        (("members", "../law"), None),
        (("members", "LAW"), json.loads(INDEX.to_json())["members"]["law"]),
    ],
)
def test_a_damaged_field_is_an_error_that_says_so(path, value):
    with pytest.raises(BankError, match="damaged"):
        BankIndex.from_json(damaged(path, value), "bank.json")


@pytest.mark.parametrize("key", sorted(json.loads(INDEX.to_json())))
def test_a_missing_field_is_an_error(key):
    data = json.loads(INDEX.to_json())
    del data[key]
    with pytest.raises(BankError):
        BankIndex.from_json(json.dumps(data), "bank.json")


ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
PATHS = [(key,) for key in json.loads(INDEX.to_json())] + [
    ("members", "law", key) for key in json.loads(INDEX.to_json())["members"]["law"]
]


@settings(max_examples=200, deadline=None)
@given(path=st.sampled_from(PATHS), value=ANYTHING)
def test_anything_anywhere_is_an_index_or_a_bank_error(path, value):
    with contextlib.suppress(BankError):
        index = BankIndex.from_json(damaged(path, value), "bank.json")
        assert BankIndex.from_json(index.to_json(), "bank.json") == index


@settings(max_examples=100, deadline=None)
@given(start=st.integers(0, 800), length=st.integers(1, 20), text=st.text(max_size=5))
def test_a_spoilt_text_is_an_index_or_a_bank_error(start, length, text):
    whole = INDEX.to_json()
    with contextlib.suppress(BankError):
        BankIndex.from_json(whole[:start] + text + whole[start + length :], "bank.json")
