import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterbank.adapters import LoraAdapter, LoraFactors
from adapterbank.bank import Bank, PartialFit
from adapterbank.bank.index import ModuleEntry
from adapterbank.errors import BankError, MissingFileError
from families import make_family


def joined(*parts):
    whole = PartialFit()
    for part in parts:
        whole.merge(part)
    return whole


def moments(sketch):
    return {
        (name, side): moment._folded() if moment._moment is not None else moment._rows().T @ moment._rows()
        for name, pair in sketch._moments.items()
        for side, moment in zip(("in", "out"), pair, strict=True)
    }


def close(one, other):
    left, right = moments(one), moments(other)
    assert left.keys() == right.keys()
    for key, value in left.items():
        torch.testing.assert_close(value, right[key], rtol=0, atol=1e-5 * float(value.diagonal().max()))


@pytest.fixture(scope="module")
def parts(planted):
    # twice 64 rows are more than the width: both forms of a moment take part
    return [Bank.partial(planted[:2]), Bank.partial(planted[2:5]), Bank.partial(planted[5:])]


@pytest.fixture(scope="module")
def whole(planted):
    return Bank.partial(planted)


def test_joined_sketches_are_the_sketch_of_all(parts, whole):
    close(joined(*parts), whole)
    assert joined(*parts).adapters == whole.adapters


def test_joining_is_commutative_and_associative(parts):
    a, b, c = parts
    close(joined(a, b, c), joined(c, b, a))
    close(joined(joined(a, b), c), joined(a, joined(b, c)))


def test_joining_leaves_the_other_as_it_was(parts):
    before = {key: value.clone() for key, value in moments(parts[1]).items()}
    joined(*parts)
    for key, value in moments(parts[1]).items():
        assert torch.equal(value, before[key])


def test_a_fit_from_sketches_is_the_fit(planted, parts, distance):
    plain, sketched = (
        Bank.fit(planted, max_error=0.1),
        Bank.fit(planted, max_error=0.1, partial=joined(*reversed(parts))),
    )
    assert sketched.directions() == plain.directions()
    assert sketched.bytes == pytest.approx(plain.bytes, rel=0.01)
    assert list(sketched.errors().values()) == pytest.approx(list(plain.errors().values()), rel=0.1)


def test_a_fit_from_one_sketch_of_all_is_the_same_fit_to_the_byte(planted, whole):
    assert Bank.fit(planted, ratio=8.0, partial=whole).index == Bank.fit(planted, ratio=8.0).index


def test_a_sketch_of_other_adapters_is_refused(planted, parts):
    with pytest.raises(BankError, match="the sketch is of 2 adapters, not of these 10"):
        Bank.fit(planted, partial=parts[0])


def test_a_saved_sketch_comes_back(parts, tmp_path):
    for part in [*parts, PartialFit()]:
        part.save(tmp_path / "part")
        loaded = PartialFit.load(tmp_path / "part")
        close(loaded, part)
        assert loaded.adapters == part.adapters


def test_any_module_name_survives_saving(tmp_path):
    # a name comes from a stranger's file
    factors = LoraFactors(A=torch.ones(1, 4), B=torch.ones(3, 1), scale=1.0)
    sketch = Bank.partial([LoraAdapter.from_factors("a", {"layer|0|in": factors, "adapters": factors})])
    sketch.save(tmp_path / "part")
    close(PartialFit.load(tmp_path / "part"), sketch)


def test_an_adapter_in_both_is_refused(planted, parts, tmp_path):
    twin = shutil.copytree(planted[0], tmp_path / "ADAPTER_000")
    with pytest.raises(BankError, match="'adapter_000' is in both sketches"):
        joined(parts[0], Bank.partial([twin]))


def test_other_shapes_are_refused_and_change_nothing(parts, tmp_path):
    other = make_family(tmp_path, n=1, hidden=32, layers=2, rank=4, shared_rank=4, prefix="other")
    mine = joined(parts[0])
    before = {key: value.clone() for key, value in moments(mine).items()}
    with pytest.raises(BankError, match="64 -> 64"):
        mine.merge(Bank.partial(other))
    assert mine.adapters == parts[0].adapters
    assert all(torch.equal(value, before[key]) for key, value in moments(mine).items())


def test_a_module_it_has_not_seen_is_an_error(parts):
    with pytest.raises(BankError, match="nothing for q, expected 8 -> 8"):
        parts[0].module(ModuleEntry(name="q", d_in=8, d_out=8))


def test_what_is_no_sketch_is_refused(parts, tmp_path):
    with pytest.raises(MissingFileError, match="does not exist"):
        PartialFit.load(tmp_path / "nowhere")
    (tmp_path / "junk").write_bytes(b"junk")
    parts[0].save(tmp_path / "part")
    tensors = load_file(tmp_path / "part")
    key = next(k for k in tensors if k.endswith("|counts"))
    spoilt = [
        {k: v for k, v in tensors.items() if k != "adapters"},
        {k: v for k, v in tensors.items() if k != key},
        tensors | {key: torch.tensor([2**40, 1, 512, 0])},
        tensors | {key: torch.zeros(2)},
        tensors | {"one|more": torch.zeros(1)},
        tensors | {"adapters": torch.full((4,), 255, dtype=torch.uint8)},
    ]
    files = [tmp_path / "junk"]
    for i, spoil in enumerate(spoilt):
        files.append(tmp_path / f"spoilt{i}")
        save_file(spoil, files[-1])
    for file in files:
        with pytest.raises(BankError, match=r"no sketch|second moment"):
            PartialFit.load(file)
