import json
import shutil
from dataclasses import replace

import pytest
import torch

from adapterbank.adapters import LoraAdapter
from adapterbank.bank import Bank, store
from adapterbank.errors import AdapterError, BankError, MissingFileError, UnknownNameError
from families import corrupt, make_family


def same(one, other):
    """Bit-equal adapters."""
    assert dict(one.modules) == dict(other.modules)
    assert dict(one.scales) == dict(other.scales)
    for module in one.modules:
        left, right = one.factors(module), other.factors(module)
        assert torch.equal(left.A, right.A)
        assert torch.equal(left.B, right.B)
    assert one.extra_names == other.extra_names
    assert all(torch.equal(one.extra(name), other.extra(name)) for name in one.extra_names)


def flip(path, place=-1):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.fixture
def reads(monkeypatch):
    """Names of the bank's files as they are read."""
    seen = []
    original = store.read_bytes

    def read_bytes(directory, name, sha256):
        seen.append(name)
        return original(directory, name, sha256)

    monkeypatch.setattr(store, "read_bytes", read_bytes)
    return seen


# --- save and load ----------------------------------------------------------------------------------------------------


def test_a_saved_bank_is_the_bank(planted, tmp_path):
    bank = Bank.fit(planted[:4], max_error=0.1)
    before = {name: bank.reconstruct(name) for name in bank.names}
    bank.save(tmp_path / "new" / "bank")
    loaded = Bank.load(str(tmp_path / "new" / "bank"))
    assert loaded.index == bank.index
    assert loaded.names == [p.name for p in planted[:4]]
    for name in bank.names:
        same(loaded.reconstruct(name), before[name])
        same(bank.reconstruct(name), before[name])


def test_the_directory_holds_the_index_the_basis_and_a_file_a_member(bank, bank_dir):
    expected = {"bank.json", ".lock", store.basis_file(bank.index.basis)}
    assert {p.name for p in bank_dir.iterdir()} == expected | {store.member_file(bank[n].sha256) for n in bank.names}


def test_bytes_on_disk_are_the_bytes_of_the_summary(bank, bank_dir, size_of):
    summary = bank.summary()
    assert size_of(bank_dir) == bank.bytes == summary["bytes"]
    assert summary["basis_bytes"] == (bank_dir / store.basis_file(bank.index.basis)).stat().st_size
    assert summary["adapters"] == len(bank) == 10
    assert summary["largest_error"] == max(bank.errors().values())
    assert summary["error"] == pytest.approx((sum(e * e for e in bank.errors().values()) / 10) ** 0.5)
    assert summary["ratio"] == pytest.approx(4 * 10 * 4 * 4 * 128 / size_of(bank_dir))
    assert json.loads(json.dumps(summary))["method"] == "product"


def test_no_path_and_no_user_name_is_inside(bank_dir, planted):
    text = b"".join(p.read_bytes() for p in bank_dir.iterdir())
    for secret in (str(planted[0].parent), "/tmp", "root"):
        assert secret.encode() not in text


def test_opening_reads_the_index_and_nothing_else(bank_dir, reads):
    for path in bank_dir.glob("*.safetensors"):
        path.unlink()
    bank = Bank.load(bank_dir)
    assert len(bank) == 10
    assert bank.errors()
    assert bank.bytes > 0
    assert repr(bank) == f"Bank(10 adapters of synthetic/base-1024, {bank.bytes:,} bytes)"
    assert reads == []


def test_restoring_one_adapter_reads_its_own_file_and_the_basis_once(bank, reads):
    bank.reconstruct("adapter_003")
    bank.reconstruct("adapter_004")
    own = [store.member_file(bank[name].sha256) for name in ("adapter_003", "adapter_004")]
    assert sorted(reads) == sorted([store.basis_file(bank.index.basis), *own])


def test_saving_elsewhere_copies_and_saving_again_writes_the_index_only(bank, bank_dir, tmp_path, listing):
    bank.save(tmp_path / "copy")
    assert listing(tmp_path / "copy") == listing(bank_dir)
    stamps = {p.name: p.stat().st_ino for p in bank_dir.glob("*.safetensors")}
    bank.save(tmp_path / "copy")
    Bank.load(bank_dir).save(bank_dir)
    assert stamps == {p.name: p.stat().st_ino for p in bank_dir.glob("*.safetensors")}


def test_saving_over_another_bank_replaces_it_and_sweeps_its_files(bank, bank_dir, planted, tmp_path, listing):
    Bank.fit(planted[:2], max_error=0.3).save(tmp_path / "other")
    bank.save(tmp_path / "other")
    assert listing(tmp_path / "other") == listing(bank_dir)


def test_a_saved_bank_outlives_the_object_that_made_it(planted, tmp_path):
    bank = Bank.fit(planted[:2], max_error=0.3)
    staging = bank._staging.path
    bank.save(tmp_path / "bank")
    del bank
    assert not staging.exists()
    assert Bank.load(tmp_path / "bank").reconstruct("adapter_001")


def test_a_directory_without_a_bank_is_missing(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(MissingFileError, match=r"holds no bank\.json"):
            Bank.load(path)
        with pytest.raises(MissingFileError), Bank.edit(path):
            pass
    assert not (tmp_path / "nowhere").exists()


def test_a_bank_is_not_saved_over_something_else(bank, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("years of it")
    with pytest.raises(BankError, match=r"thesis\.tex"):
        bank.save(tmp_path / "work")
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["thesis.tex"]


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 60, -1])
def test_a_flipped_byte_of_a_member_is_found_and_the_others_still_read(bank, bank_dir, place):
    flip(bank_dir / store.member_file(bank["adapter_002"].sha256), place)
    with pytest.raises(BankError, match="is damaged: its sha256"):
        bank.reconstruct("adapter_002")
    assert bank.reconstruct("adapter_003")


def test_a_flipped_byte_of_the_basis_is_found(bank, bank_dir):
    flip(bank_dir / store.basis_file(bank.index.basis))
    with pytest.raises(BankError, match="is damaged: its sha256"):
        bank.reconstruct("adapter_000")


def test_damage_is_not_copied(bank, bank_dir, tmp_path):
    flip(bank_dir / store.member_file(bank["adapter_002"].sha256))
    with pytest.raises(BankError, match="is damaged"):
        bank.save(tmp_path / "copy")
    with pytest.raises(MissingFileError):
        Bank.load(tmp_path / "copy")


def test_saving_a_good_copy_mends_a_damaged_bank(bank, bank_dir, tmp_path, listing):
    whole = listing(bank_dir)
    bank.save(tmp_path / "copy")
    flip(bank_dir / store.member_file(bank["adapter_002"].sha256))
    Bank.load(tmp_path / "copy").save(bank_dir)
    assert listing(bank_dir) == whole


def tampered(bank_dir, **changes):
    """A bank whose member 0 has another payload than its index says, with the hashes put right: by a stranger."""
    bank = Bank.load(bank_dir)
    entry = bank["adapter_000"]
    tensors = store.read_file(bank_dir, store.member_file(entry.sha256), entry.sha256)
    data, digest = store.serialise(tensors | changes.pop("tensors", {}))
    store.write_file(bank_dir, store.member_file(digest), data, digest)
    members = dict(bank.index.members) | {"adapter_000": replace(entry, sha256=digest, **changes)}
    store.commit(bank_dir, replace(bank.index, members=members))
    return Bank.load(bank_dir)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": 5}, "its table is one of 2048 values, the index says 5"),
        ({"scales": ()}, "pairs at rank 4, scale 0"),
        ({"tensors": {"payload": torch.zeros(3, dtype=torch.uint8)}}, "damaged"),
        ({"tensors": {"payload": torch.zeros(4, dtype=torch.uint8)}}, "damaged"),
        ({"tensors": {"payload": torch.full((40,), 255, dtype=torch.uint8)}}, "damaged"),
        ({"tensors": {"payload": torch.zeros(4, 4, dtype=torch.uint8)}}, "damaged"),
        ({"tensors": {"payload": torch.zeros(40)}}, "damaged"),
        ({"tensors": {"payload": torch.zeros(40, dtype=torch.bfloat16)}}, "damaged"),
    ],
)
def test_a_strangers_payload_is_refused_by_name_before_it_costs_anything(bank_dir, changes, message):
    with pytest.raises(BankError, match=message) as caught:
        tampered(bank_dir, **changes).reconstruct("adapter_000")
    assert "adapter_000" in str(caught.value)


def test_a_file_without_a_payload_is_refused(bank_dir):
    bank = Bank.load(bank_dir)
    data, digest = store.serialise({"tensor": torch.zeros(2)})
    store.write_file(bank_dir, store.member_file(digest), data, digest)
    members = dict(bank.index.members) | {"adapter_000": replace(bank["adapter_000"], sha256=digest)}
    store.commit(bank_dir, replace(bank.index, members=members))
    with pytest.raises(BankError, match="holds no payload"):
        Bank.load(bank_dir).reconstruct("adapter_000")


def test_values_that_are_not_finite_are_refused(planted, tmp_path):
    Bank.fit(planted[:2], k=4, quantize=False).save(tmp_path / "bank")
    bank = Bank.load(tmp_path / "bank")
    entry = bank["adapter_000"]
    tensors = store.read_file(tmp_path / "bank", store.member_file(entry.sha256), entry.sha256)
    payload = tensors["payload"].clone()
    payload[-4:] = torch.tensor([0, 0, 0x80, 0x7F], dtype=torch.uint8)  # infinity
    with pytest.raises(BankError, match="values that are not finite"):
        tampered(tmp_path / "bank", tensors={"payload": payload}).reconstruct("adapter_000")


# --- members ----------------------------------------------------------------------------------------------------------


def test_a_member_is_asked_for_by_its_exact_name(bank):
    assert "adapter_001" in bank
    assert "ADAPTER_001" not in bank
    assert list(bank) == bank.names
    with pytest.raises(UnknownNameError, match="did you mean 'adapter_001'"):
        bank["ADAPTER_001"]
    with pytest.raises(UnknownNameError, match=r"it has adapter_000, .* and 5 more"):
        bank.reconstruct("law")


def test_an_added_adapter_is_coded_like_the_fit(bank, bank_dir, planted, later, distance):
    assert bank.add(later[0]) == ["later_0"]
    added, first = bank["later_0"], bank["adapter_000"]
    assert distance(later[0], bank.reconstruct("later_0")) == pytest.approx(added.error, rel=1e-3)
    # the promise of the fit
    assert 0.09 < added.error <= 0.1
    # it is no part of what the basis was fitted to
    assert added.bytes < 1.6 * first.bytes
    bank.save(bank_dir)
    assert Bank.load(bank_dir).names == [*(p.name for p in planted), "later_0"]


def test_an_adapter_added_again_is_coded_the_same(planted):
    # the basis is the decoded one in the fit as in add
    bank = Bank.fit(planted[:4], ratio=8.0)
    before = bank["adapter_002"]
    bank.remove("adapter_002")
    bank.add(planted[2])
    assert bank["adapter_002"] == before


@pytest.mark.parametrize("arguments", [{"k": 6}, {"k": 6, "quantize": False}, {"method": "eigenlora", "k": 6}])
def test_plain_banks_take_adapters_too(planted, later, distance, arguments):
    bank = Bank.fit(planted, **arguments)
    bank.add(later)
    for path in later:
        found = distance(path, bank.reconstruct(path.name))
        assert found == pytest.approx(bank[path.name].error, rel=1e-3)
        assert found < 0.3


def test_a_flat_bank_refuses_another_rank(tmp_path):
    four = make_family(tmp_path, n=4, rank=4, hidden=32, layers=1, shared_rank=4)
    [three] = make_family(tmp_path, n=1, rank=3, hidden=32, layers=1, shared_rank=4, prefix="three")
    bank = Bank.fit(four, method="flat", k=2)
    with pytest.raises(BankError, match="rank 3"):
        bank.add(three)
    assert bank.names == [p.name for p in four]


def test_what_does_not_belong_is_not_added(bank, planted, later, tmp_path):
    index = bank.index
    [wide] = make_family(tmp_path, n=1, rank=4, hidden=64, layers=3, shared_rank=4, prefix="wide")
    for source, error, message in (
        (planted[0], AdapterError, "the bank has a member 'adapter_000' already"),
        ({"ADAPTER_000": later[0]}, AdapterError, "the bank has a member 'adapter_000' already"),
        (
            corrupt(later[0], "base", tmp_path / "b"),
            AdapterError,
            "'b' was trained on 'other/base', the bank on",
        ),
        (corrupt(later[0], "shape", tmp_path / "s"), AdapterError, "32 -> 64, in the bank it is 64 -> 64"),
        (corrupt(later[0], "nan", tmp_path / "n"), AdapterError, "not finite"),
        (wide, BankError, r"no basis for model\.layers\.2.*use absorb"),
        ([], BankError, "no adapter"),
        ([later[0], tmp_path / "nowhere"], MissingFileError, "nowhere"),
    ):
        with pytest.raises(error, match=message):
            bank.add(source)
    assert bank.index == index


def test_what_does_not_belong_is_listed_where_asked(bank, planted, later):
    assert bank.add([planted[0], later[0]], skip_bad=True) == ["later_0"]
    assert [r.name for r in bank.refused] == [str(planted[0])]
    assert "already" in bank.refused[0].reason


def test_a_removed_member_is_gone_and_its_file_is_swept(bank, bank_dir, size_of):
    gone = bank_dir / store.member_file(bank["adapter_003"].sha256)
    bank.remove("adapter_003")
    assert "adapter_003" not in bank
    assert gone.exists()
    assert "adapter_003" in Bank.load(bank_dir)
    bank.save(bank_dir)
    assert not gone.exists()
    assert "adapter_003" not in Bank.load(bank_dir)
    assert size_of(bank_dir) == bank.bytes
    with pytest.raises(UnknownNameError):
        bank.remove("adapter_003")


def test_of_two_equal_members_one_may_go(planted, tmp_path):
    bank = Bank.fit([planted[0], f"twin={planted[0]}"], max_error=0.3)
    bank.remove("adapter_000")
    bank.save(tmp_path / "bank")
    assert Bank.load(tmp_path / "bank").reconstruct("twin")


def test_an_empty_bank_can_be_saved_and_filled(bank, bank_dir, later):
    for name in bank.names:
        bank.remove(name)
    bank.save(bank_dir)
    empty = Bank.load(bank_dir)
    assert empty.summary()["error"] == 0
    empty.add(later[0])
    assert empty.names == ["later_0"]
    other = Bank.load(bank_dir)
    assert list(other.absorb(later[:2])) == ["later_0", "later_1"]


def test_a_renamed_member_is_the_same_in_the_same_place(bank, bank_dir):
    before = bank["adapter_001"]
    bank.rename("adapter_001", "law")
    bank.save(bank_dir)
    loaded = Bank.load(bank_dir)
    assert loaded.names[:3] == ["adapter_000", "law", "adapter_002"]
    assert loaded["law"] == before
    assert loaded.reconstruct("law").name == "law"
    bank.rename("law", "LAW")
    assert "LAW" in bank


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".x", "a" * 129, "x\n", "ä", "a b"])
def test_names_that_could_be_paths_are_refused(bank, name):
    with pytest.raises(AdapterError, match="can't name an adapter"):
        bank.rename("adapter_001", name)


def test_a_name_that_is_taken_is_refused(bank):
    with pytest.raises(BankError, match="already"):
        bank.rename("adapter_001", "Adapter_000")
    with pytest.raises(UnknownNameError):
        bank.rename("law", "tax")


# --- absorbing, compacting, combining ---------------------------------------------------------------------------------


def test_absorbing_reports_bounds_that_hold_against_the_originals(bank, planted, later, distance):
    before = bank.errors()
    errors = bank.absorb(later)
    assert set(errors) == {p.name for p in (*planted, *later)}
    for path in planted:
        true = distance(path, bank.reconstruct(path.name))
        assert true <= errors[path.name] * (1 + 1e-5)
        assert errors[path.name] > before[path.name]
        assert bank[path.name].bound
    for path in later:
        assert distance(path, bank.reconstruct(path.name)) == pytest.approx(errors[path.name], rel=1e-3)
        assert not bank[path.name].bound


def test_absorbing_twice_adds_the_bounds_up(planted, later, distance):
    bank = Bank.fit(planted[:3], max_error=0.1)
    bank.absorb(later[0])
    bank.absorb(later[1])
    for path in (planted[0], later[0]):
        assert distance(path, bank.reconstruct(path.name)) <= bank[path.name].error * (1 + 1e-5)
    assert bank[planted[0].name].error > bank["later_0"].error > bank["later_1"].error


def test_absorbing_with_originals_is_the_fit_of_all(planted, later):
    bank = Bank.fit(planted[:3], max_error=0.1)
    bank.absorb(later[0], originals={p.name: p for p in planted[:3]})
    fitted = Bank.fit([*planted[:3], later[0]], max_error=0.1)
    assert bank.index == fitted.index
    assert not any(bank[name].bound for name in bank.names)


def test_the_basis_learns_a_new_module(planted, tmp_path, distance):
    bank = Bank.fit(planted[:2], max_error=0.1)
    [wide] = make_family(tmp_path, n=1, rank=4, hidden=64, layers=3, shared_rank=4, prefix="wide")
    bank.absorb(wide)
    assert len(bank.directions()) == 6
    assert distance(wide, bank.reconstruct("wide_000")) <= 0.1 * (1 + 1e-5)
    assert len(bank.reconstruct("adapter_000").modules) == 4


def test_where_old_members_came_from_is_not_forgotten(planted, later):
    bank = Bank.fit(planted[:2], max_error=0.3)
    before = bank["adapter_000"]
    bank.absorb(later[0])
    after = bank["adapter_000"]
    assert (after.source, after.source_bytes) == (before.source, before.source_bytes)


def test_absorbing_a_bad_adapter_changes_nothing(bank, planted, tmp_path, later):
    index = bank.index
    for source in (planted[0], corrupt(later[0], "nan", tmp_path / "bad")):
        with pytest.raises(AdapterError):
            bank.absorb(source)
    with pytest.raises(UnknownNameError):
        bank.absorb(later[0], originals={"law": later[1]})
    assert bank.index == index
    assert bank.reconstruct("adapter_000")


def test_an_absorbed_bank_is_saved_whole(bank, bank_dir, later, size_of):
    bank.absorb(later[0])
    restored = bank.reconstruct("adapter_000")
    bank.save(bank_dir)
    loaded = Bank.load(bank_dir)
    same(loaded.reconstruct("adapter_000"), restored)
    assert size_of(bank_dir) == loaded.bytes


def test_compacting_stores_k_directions_a_side(planted, distance):
    planted = planted[:4]
    bank = Bank.fit(planted, max_error=0.1)
    bank.compact(7)
    assert set(bank.directions().values()) == {(7, 7)}
    for path in planted:
        assert bank[path.name].bound
        assert distance(path, bank.reconstruct(path.name)) <= bank[path.name].error * (1 + 1e-5)


def test_two_banks_become_one(planted, later, distance):
    first, second = Bank.fit(planted[:2], max_error=0.1), Bank.fit(later, max_error=0.05)
    bank = Bank.combine(first, second)
    assert bank.names == [*first.names, *second.names]
    for path in (*planted[:2], *later):
        assert distance(path, bank.reconstruct(path.name)) <= bank[path.name].error * (1 + 1e-5)
    # as the first was asked, on top of what each had lost
    assert max(bank[name].error for name in second.names) <= 0.05 + 0.1 * 1.05 + 1e-6
    assert len(first) == 2


def test_banks_that_do_not_belong_together_are_not_combined(planted, tmp_path):
    first = Bank.fit(planted[:2], max_error=0.3)
    with pytest.raises(AdapterError, match="two adapters are named 'adapter_001'"):
        Bank.combine(first, Bank.fit(planted[1:3], max_error=0.3))
    other = corrupt(planted[3], "base", tmp_path / "other")
    with pytest.raises(AdapterError, match="'other' was trained on 'other/base', adapter 'adapter_000' on"):
        Bank.combine(first, Bank.fit([other], max_error=0.3))


# --- against the originals --------------------------------------------------------------------------------------------


def test_verify_measures_again(bank, planted, distance):
    errors = bank.verify(planted)
    assert errors == pytest.approx(bank.errors(), rel=1e-4)
    assert bank.verify({"adapter_001": planted[1]}) == {"adapter_001": errors["adapter_001"]}
    renamed = shutil.copytree(planted[1], planted[1].parent.parent / "elsewhere")
    assert bank.verify([f"adapter_001={renamed}"]) == {"adapter_001": errors["adapter_001"]}
    assert bank.verify({"adapter_001": LoraAdapter.load(renamed)}) == {"adapter_001": errors["adapter_001"]}


def test_verify_tells_another_adapter_from_the_original(bank, planted, later, tmp_path):
    assert bank.verify({"adapter_001": planted[2]})["adapter_001"] > 0.5
    with pytest.raises(UnknownNameError):
        bank.verify([later[0]])
    [other] = make_family(tmp_path, n=1, rank=3, hidden=64, layers=2, shared_rank=4)
    with pytest.raises(BankError, match="other modules or ranks"):
        bank.verify({"adapter_001": other})


def test_verify_compares_task_heads(adapter_dirs):
    bank = Bank.fit(adapter_dirs, max_error=0.1)
    assert max(bank.verify(adapter_dirs).values()) <= 0.1
    with pytest.raises(BankError, match=r"has another score\.weight"):
        bank.verify({"adapter_000": adapter_dirs[1]})


def test_an_exported_member_is_an_ordinary_adapter(bank, tmp_path, distance):
    bank.export("adapter_001", tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert distance(tmp_path / "out", bank.reconstruct("adapter_001")) < 1e-6


# --- changing a bank that others use ----------------------------------------------------------------------------------


def test_an_edit_is_saved_and_a_failed_one_is_not(bank_dir, later, listing):
    with Bank.edit(bank_dir) as bank:
        bank.add(later[0])
    assert "later_0" in Bank.load(bank_dir)
    before = listing(bank_dir)
    with pytest.raises(AdapterError), Bank.edit(bank_dir) as bank:
        bank.add(later[1])
        bank.add(later[0])
    assert listing(bank_dir) == before


def test_what_a_dead_writer_left_is_swept_and_strangers_files_are_not(bank_dir, later):
    for name in (".0123abcd.tmp", "0123456789abcdef.safetensors", "basis-0123456789abcdef.safetensors"):
        (bank_dir / name).write_bytes(b"half")
    (bank_dir / "README.md").write_text("mine")
    with Bank.edit(bank_dir) as bank:
        bank.remove("adapter_000")
    left = {p.name for p in bank_dir.iterdir()}
    assert not any(name.endswith(".tmp") or "0123456789abcdef" in name for name in left)
    assert "README.md" in left


def test_a_bank_that_another_process_changed_says_so(bank, bank_dir):
    with Bank.edit(bank_dir) as other:
        other.remove("adapter_004")
    with pytest.raises(MissingFileError, match="another process has changed the bank"):
        bank.reconstruct("adapter_004")
    # and is not saved with a member whose file is gone
    bank.rename("adapter_000", "law")
    with pytest.raises(MissingFileError, match="another process has changed the bank"):
        bank.save(bank_dir)
    assert "adapter_000" in Bank.load(bank_dir)
