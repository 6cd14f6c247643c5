import shutil

import pytest

from adapterbank.adapters import LoraAdapter
from adapterbank.bank.family import Family, named_sources, open_family
from adapterbank.errors import AdapterError, BankError, MissingFileError
from families import CORRUPTIONS, corrupt, make_family


def test_a_family_knows_names_modules_and_energies(planted, distance):
    family = open_family(planted)
    assert family.names() == [p.name for p in planted]
    assert len(family.module_names()) == 4
    assert family.base == "synthetic/base-1024"
    assert family.values(0) == 4 * 4 * (64 + 64)
    for i, adapter in enumerate(family.adapters):
        dense = [adapter.factors(m).update().double() for m in adapter.modules]
        assert family.energies[i] == pytest.approx(sum(float(dW.square().sum()) for dW in dense), rel=1e-5)
        assert family.weight(i) == 1 / family.energies[i]


def test_an_update_is_the_same_from_the_cache(planted):
    family = open_family(planted[:1])
    module = family.module_names()[0]
    assert family.update(0, module) is family.update(0, module)


def test_names_differ_by_more_than_case(planted, tmp_path):
    twin = shutil.copytree(planted[1], tmp_path / planted[0].name.upper())
    with pytest.raises(AdapterError, match=r"two adapters are named 'ADAPTER_000' \(and 'adapter_000'\).*NAME=PATH"):
        open_family([planted[0], twin])
    assert open_family([planted[0], f"law={twin}"]).names() == ["adapter_000", "law"]


def test_the_same_name_twice_is_an_error(planted):
    with pytest.raises(AdapterError, match="two adapters are named 'adapter_000'"):
        open_family([planted[0], planted[0]])


def test_a_mapping_names_adapters_in_any_form(planted):
    loaded = LoraAdapter.load(planted[1])
    assert open_family({"law": planted[0], "tax": loaded}).names() == ["law", "tax"]
    assert loaded.name == "adapter_001"
    with pytest.raises(AdapterError, match="can't name an adapter"):
        open_family({"../law": loaded})


def test_a_path_with_an_equals_sign_is_a_path_where_there_is_one(planted, tmp_path):
    odd = shutil.copytree(planted[0], tmp_path / "lr=3")
    assert named_sources([str(odd)]) == [(None, str(odd))]
    assert named_sources(["law=some/where"]) == [("law", "some/where")]


def test_one_path_instead_of_a_list_is_an_error(planted):
    with pytest.raises(BankError, match="give a list"):
        open_family(str(planted[0]))


def test_no_adapter_at_all_is_an_error():
    with pytest.raises(BankError, match="no adapter to fit; give at least one"):
        open_family([])


def test_another_base_names_both_adapters_and_both_bases(planted, tmp_path):
    other = corrupt(planted[1], "base", tmp_path / "other")
    with pytest.raises(AdapterError, match="'other' was trained on 'other/base', adapter 'adapter_000' on 'syn"):
        open_family([planted[0], other])
    family = open_family([planted[0], other], base="org/same-after-all")
    assert family.base == "org/same-after-all"


def test_another_shape_names_both_adapters_the_module_and_both_shapes(planted, tmp_path):
    other = corrupt(planted[1], "shape", tmp_path / "other")
    with pytest.raises(AdapterError, match=r"'other', .*q_proj: .* 32 -> 64, in adapter 'adapter_000' it is 64 -> 64"):
        open_family([planted[0], other])


@pytest.mark.parametrize("kind", sorted(set(CORRUPTIONS) - {"zero"}))
def test_the_first_bad_adapter_stops_or_is_listed(planted, tmp_path, kind):
    sources = [planted[0], corrupt(planted[1], kind, tmp_path / "bad"), planted[2]]
    with pytest.raises((AdapterError, MissingFileError)) as caught:
        open_family(sources)
    assert "bad" in str(caught.value)
    family = open_family(sources, skip_bad=True)
    assert family.names() == ["adapter_000", "adapter_002"]
    assert [r.reason for r in family.refused] == [str(caught.value)]


def test_a_refused_adapter_leaves_no_module_behind(planted, tmp_path):
    [wide] = make_family(tmp_path, n=1, hidden=128, layers=3, rank=2, shared_rank=2, prefix="wide")
    family = open_family([planted[0], wide], skip_bad=True)
    assert len(family.modules) == 4
    assert len(family.adapters) == len(family.energies) == 1


def test_names_of_the_bank_are_taken(planted):
    family = Family(taken=frozenset({"Adapter_000"}))
    with pytest.raises(AdapterError, match="the bank has a member 'Adapter_000' already"):
        open_family(planted[:1], into=family)


def test_zero_updates_weigh_nothing(planted, tmp_path):
    family = open_family([corrupt(planted[0], "zero", tmp_path / "zero")])
    assert family.energies == [0.0]
    assert family.weight(0) == 0.0


def test_progress_is_told_of_every_adapter(planted):
    seen = []
    open_family(planted[:3], progress=lambda *what: seen.append(what))
    assert seen == [("reading", 1, 3), ("reading", 2, 3), ("reading", 3, 3)]
