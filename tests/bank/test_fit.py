import math
from dataclasses import replace

import pytest
import torch

from adapterbank.adapters import LoraAdapter, LoraFactors
from adapterbank.bank import Bank, fit, statistics
from adapterbank.errors import BankError
from families import corrupt, make_family


def spent(adapters):
    """Bytes of all A and B in float32."""
    loaded = [a if isinstance(a, LoraAdapter) else LoraAdapter.load(a) for a in adapters]
    return 4 * sum(s.rank * (s.d_in + s.d_out) for a in loaded for s in a.modules.values())


def rewritten(adapter, change):
    """The same updates by other factors."""
    factors = {module: change(adapter.factors(module), i) for i, module in enumerate(adapter.modules)}
    return LoraAdapter.from_factors(adapter.name, factors, base=adapter.base, config=adapter.config)


# --- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [3.0, 13.0])
def test_a_ratio_is_kept_by_the_bytes_on_disk(planted, tmp_path, size_of, ratio):
    bank = Bank.fit(planted, ratio=ratio)
    bank.save(tmp_path / "bank")
    assert 0.98 * spent(planted) / ratio < size_of(tmp_path / "bank") <= spent(planted) / ratio
    assert bank.summary()["ratio"] == pytest.approx(spent(planted) / size_of(tmp_path / "bank"))


def test_a_budget_is_kept_by_the_bytes_on_disk(planted, tmp_path, size_of):
    Bank.fit(planted, budget="10kB").save(tmp_path / "bank")
    assert 9_800 < size_of(tmp_path / "bank") <= 10_000


def test_many_adapters_meet_the_ratio_too(planted, tmp_path, size_of, monkeypatch):
    # beyond twice as many, a sample predicts the bytes
    monkeypatch.setattr(fit, "SIZE_ADAPTERS", 4)
    Bank.fit(planted, ratio=8.0).save(tmp_path / "bank")
    assert 0.98 * spent(planted) / 8 < size_of(tmp_path / "bank") <= spent(planted) / 8


@pytest.mark.parametrize("max_error", [0.3, 0.05, 0.004])
def test_an_error_is_a_promise_for_every_single_adapter(planted, distance, max_error):
    bank = Bank.fit(planted, max_error=max_error)
    for path in planted:
        found = distance(path, bank.reconstruct(path.name))
        assert found <= max_error * (1 + 1e-5)
        assert found == pytest.approx(bank[path.name].error, rel=1e-3)
        # and not wasted: bytes that nobody asked for
        assert found > 0.9 * max_error


def test_the_default_is_an_error_of_a_twentieth(planted):
    errors = Bank.fit(planted).errors().values()
    assert 0.045 < max(errors) <= 0.05


def test_more_bytes_are_less_error(planted):
    errors = [Bank.fit(planted[:6], ratio=ratio).summary()["error"] for ratio in (10.0, 6.0, 3.0)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("arguments", [{"max_error": 1e-5}, {"ratio": 1.1}, {"quantize": False, "max_error": 1e-5}])
def test_with_enough_bytes_the_update_comes_back(planted, distance, arguments):
    bank = Bank.fit(planted[:4], **arguments)
    assert max(distance(path, bank.reconstruct(path.name)) for path in planted[:4]) < 1e-5


def test_bytes_that_not_even_the_index_fits_are_refused(planted):
    with pytest.raises(BankError, match="index alone takes"):
        Bank.fit(planted, budget=1000)


def test_an_error_beyond_float32_is_refused_with_the_best_there_is(planted):
    with pytest.raises(BankError, match="can't be kept, the best found is"):
        Bank.fit(planted[:2], max_error=1e-12)


# --- exact numbers of directions --------------------------------------------------------------------------------------


def test_k_alone_is_exactly_k_directions_of_16_bits(planted, distance):
    bank = Bank.fit(planted, k=5)
    assert set(bank.directions().values()) == {(5, 5)}
    assert bank.index.coding == "int16"
    assert not torch.equal(bank.reconstruct(planted[0].name).factors(bank.index.modules[0].name).A, torch.zeros(4, 64))


def test_k_is_the_optimum_of_the_updates_and_exact_at_their_rank(planted, tmp_path, distance):
    clean = make_family(tmp_path, n=6, rank=3, hidden=40, layers=1, shared_rank=4, noise=0.0)
    assert Bank.fit(clean, k=4, quantize=False).summary()["largest_error"] < 1e-5
    assert Bank.fit(clean, k=4).summary()["largest_error"] < 1e-3
    assert Bank.fit(clean, k=3, quantize=False).summary()["largest_error"] > 0.05


def test_k_with_a_target_fixes_the_directions_and_the_target_the_rest(planted, distance):
    bank = Bank.fit(planted, k=3, max_error=0.05)
    assert set(bank.directions().values()) == {(3, 3)}
    assert max(distance(p, bank.reconstruct(p.name)) for p in planted) <= 0.05 * (1 + 1e-5)


def test_more_directions_than_the_adapters_have_is_an_error_that_names_the_rank(planted):
    for target in ({}, {"ratio": 4.0}):
        with pytest.raises(BankError, match=r"k=9 is more than model\.layers\.0.*2 adapters of together rank 8"):
            Bank.fit(planted[:2], k=9, **target)


def test_a_basis_that_does_not_pay_is_not_stored(tmp_path):
    strangers = make_family(tmp_path, n=6, rank=4, hidden=64, layers=1, shared_rank=4, clusters=64, seed=5)
    assert set(Bank.fit(strangers, max_error=0.1).directions().values()) == {(0, 0)}


@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize(("method", "arguments"), [
    ("eigenlora", {"k": 6}), ("eigenlora", {"k": 6, "mean": "none", "balance": True}), ("eigenlora", {"ratio": 3.0}),
    ("flat", {"k": 9}), ("flat", {"k": 3, "mean": "drop"}),
])  # fmt: skip
def test_the_papers_methods_store_what_they_say(planted, tmp_path, distance, size_of, method, arguments, quantize):
    bank = Bank.fit(planted, method=method, quantize=quantize, **arguments)
    bank.save(tmp_path / "bank")
    assert size_of(tmp_path / "bank") == bank.bytes
    if "ratio" in arguments:
        assert bank.bytes <= spent(planted) / 3
    for path in planted:
        assert distance(path, bank.reconstruct(path.name)) == pytest.approx(bank[path.name].error, rel=1e-3, abs=1e-6)


def test_the_papers_methods_are_exact_at_full_rank(planted, distance):
    # 10 adapters, less one for the mean
    flat = Bank.fit(planted, method="flat", k=9, quantize=False)
    assert flat.summary()["largest_error"] < 1e-4
    rows = Bank.fit(planted, method="eigenlora", k=39, quantize=False)
    assert rows.summary()["largest_error"] < 1e-4


def test_a_flat_fit_of_different_ranks_is_refused(tmp_path):
    mixed = make_family(tmp_path, n=6, ranks=(2, 4), hidden=32, layers=1, shared_rank=4)
    with pytest.raises(BankError, match=r"a flat bank needs one rank, .* has \[2, 4\]"):
        Bank.fit(mixed, method="flat", k=2)


# --- what must not matter ---------------------------------------------------------------------------------------------


def gauged(factors, seed):
    generator = torch.Generator().manual_seed(seed)
    G = torch.eye(factors.rank, dtype=torch.float64) + 0.3 * torch.randn(
        factors.rank, factors.rank, generator=generator, dtype=torch.float64
    )
    return LoraFactors(
        A=(G @ factors.A.double()).float(), B=(factors.B.double() @ torch.linalg.inv(G)).float(), scale=factors.scale
    )


def doubled(factors, seed):
    return LoraFactors(A=factors.A, B=factors.B / 2, scale=2 * factors.scale)


def rslora(factors, seed):
    root = math.sqrt(factors.rank)
    return LoraFactors(A=factors.A, B=factors.B / root, scale=factors.scale * root)


@pytest.fixture(scope="module", params=[{"ratio": 8.0}, {"max_error": 0.05}, {"k": 6}, {"k": 6, "ratio": 6.0}], ids=str)
def plain(request, planted):
    """A fit of the adapters as they are, and what was asked for."""
    originals = [LoraAdapter.load(path) for path in planted[:6]]
    return originals, request.param, Bank.fit(originals, **request.param)


@pytest.mark.parametrize("change", [gauged, doubled, rslora, None])
def test_gauge_alpha_rslora_and_order_do_not_matter(plain, distance, change):
    originals, arguments, bank = plain
    other = Bank.fit([rewritten(a, change) for a in originals] if change else originals[::-1], **arguments)
    assert bank.directions() == other.directions()
    assert other.bytes == pytest.approx(bank.bytes, rel=0.02)
    for adapter in originals:
        assert other[adapter.name].error == pytest.approx(bank[adapter.name].error, rel=0.1)
        # symbols on a threshold may go either way
        apart = distance(bank.reconstruct(adapter.name), other.reconstruct(adapter.name))
        assert apart < bank[adapter.name].error


def test_the_order_of_many_adapters_does_not_matter(planted, monkeypatch):
    # more than the allocation looks at
    monkeypatch.setattr(statistics, "STATISTICS_ADAPTERS", 4)
    one, other = Bank.fit(planted[:7], max_error=0.2), Bank.fit(planted[6::-1], max_error=0.2)
    assert one.directions() == other.directions()
    assert other.bytes == pytest.approx(one.bytes, rel=0.01)


@pytest.mark.parametrize("arguments", [{"ratio": 8.0}, {"k": 6}, {"method": "eigenlora", "k": 4}])
def test_the_same_fit_is_the_same_bytes(planted, tmp_path, listing, arguments):
    for name in ("one", "two"):
        Bank.fit(planted, seed=3, **arguments).save(tmp_path / name)
    assert listing(tmp_path / "one") == listing(tmp_path / "two")


# --- odd families -----------------------------------------------------------------------------------------------------

CODINGS = [{"max_error": 0.05}, {"ratio": 2.0}, {"k": 1}, {"quantize": False, "max_error": 0.05}]


@pytest.mark.parametrize("arguments", CODINGS)
def test_missing_modules_and_mixed_ranks_and_scales_come_back_as_they_were(tmp_path, distance, arguments):
    mixed = make_family(
        tmp_path, n=8, ranks=(1, 3, 6), alphas=(4.0, 16.0), hidden=40, d_out=24, layers=3, shared_rank=6,
        drop_layers=0.4, scale_sigma=2.0,
    )  # fmt: skip
    bank = Bank.fit(mixed, **arguments)
    for path in mixed:
        original, restored = LoraAdapter.load(path), bank.reconstruct(path.name)
        assert dict(restored.modules) == dict(original.modules)
        assert dict(restored.scales) == dict(original.scales)
        assert distance(original, restored) == pytest.approx(bank[path.name].error, rel=1e-2, abs=1e-6)
        assert "k" in arguments or distance(original, restored) < 0.2


@pytest.mark.parametrize("arguments", CODINGS[:2] + CODINGS[3:])
def test_a_rank_beyond_the_layer_comes_back(tmp_path, distance, arguments):
    wide = make_family(tmp_path, n=3, rank=9, hidden=12, d_out=5, layers=1, shared_rank=4)
    arguments = arguments if "ratio" not in arguments else {"budget": 3000}
    bank = Bank.fit(wide, **arguments)
    assert bank.reconstruct("adapter_000").modules == LoraAdapter.load(wide[0]).modules
    assert max(distance(p, bank.reconstruct(p.name)) for p in wide) < 0.2


@pytest.mark.parametrize("arguments", [{"max_error": 0.05}, {"budget": 3000}, {"k": 4}])
def test_one_adapter_is_a_bank(planted, distance, arguments):
    bank = Bank.fit(planted[:1], **arguments)
    if "k" not in arguments:  # it shares with nobody
        assert set(bank.directions().values()) == {(0, 0)}
    assert distance(planted[0], bank.reconstruct("adapter_000")) < 0.3


@pytest.mark.parametrize("arguments", [{"max_error": 0.05}, {"ratio": 6.0}, {"k": 4}, {"method": "eigenlora", "k": 4}])
def test_a_zero_update_is_legal_and_costs_next_to_nothing(planted, tmp_path, arguments):
    zero = corrupt(planted[0], "zero", tmp_path / "zero")
    bank = Bank.fit([*planted[1:6], zero], **arguments)
    assert bank["zero"].error == 0
    if "method" not in arguments:  # the mean of the others is not zero
        assert not any(bank.reconstruct("zero").factors(m.name).update().any() for m in bank.index.modules)
    if bank.index.coding == "predictive":
        assert bank["zero"].bytes < bank["adapter_001"].bytes / 3


def test_nothing_but_zero_updates_is_a_bank(planted, tmp_path):
    zeros = [corrupt(p, "zero", tmp_path / p.name) for p in planted[:2]]
    assert Bank.fit(zeros).summary()["error"] == 0


def test_a_scale_of_zero_stays_zero(planted):
    original = LoraAdapter.load(planted[0])
    silent = rewritten(original, lambda f, i: replace(f, scale=0.0 if i == 0 else -f.scale))
    restored = Bank.fit([silent], max_error=0.01).reconstruct("adapter_000")
    first, second = list(original.modules)[:2]
    assert not restored.factors(first).update().any()
    assert restored.scales[second] == -original.scales[second]
    torch.testing.assert_close(restored.factors(second).update(), -original.factors(second).update(), rtol=0, atol=2e-4)


def test_heads_come_back_bit_equal_and_do_not_count(tmp_path, size_of):
    def family(name, **fields):
        return make_family(tmp_path / name, n=3, rank=4, hidden=32, layers=1, shared_rank=4, **fields)

    headed, bare = family("headed", classifier=3, dtype="bfloat16"), family("bare", dtype="bfloat16")
    with_, without = Bank.fit(headed, max_error=0.1), Bank.fit(bare, max_error=0.1)
    with_.save(tmp_path / "bank")
    for path in headed:
        original, restored = LoraAdapter.load(path), with_.reconstruct(path.name)
        assert restored.extra_names == ("score.weight",)
        assert restored.extra("score.weight").dtype == torch.bfloat16
        assert torch.equal(restored.extra("score.weight"), original.extra("score.weight"))
        assert with_[path.name].bytes == without[path.name].bytes
    assert size_of(tmp_path / "bank") > with_.bytes + 3 * 2 * 3 * 32


def test_the_config_comes_back(adapter_dirs):
    bank = Bank.fit(adapter_dirs, max_error=0.1)
    for path in adapter_dirs:
        original, restored = LoraAdapter.load(path), bank.reconstruct(path.name)
        assert restored.task_type == "SEQ_CLS"
        assert restored.base == original.base
        assert (restored.rank, restored.alpha) == (original.rank, original.alpha)
        told = {key: value for key, value in original.config.items() if value}
        assert {key: restored.config.get(key) for key in told} == told
    # said once, not once a member
    assert len(bank.index.configs) == 1


def test_equal_adapters_share_a_file_and_are_counted_once(planted, tmp_path, size_of):
    bank = Bank.fit([planted[0], f"twin={planted[0]}", planted[1]], max_error=0.1)
    bank.save(tmp_path / "bank")
    assert bank["twin"].sha256 == bank["adapter_000"].sha256
    assert size_of(tmp_path / "bank") == bank.bytes


def test_bad_adapters_are_left_out_where_asked(planted, tmp_path):
    bad = corrupt(planted[0], "nan", tmp_path / "bad")
    bank = Bank.fit([bad, *planted[:3]], max_error=0.1, skip_bad=True)
    assert bank.names == ["adapter_000", "adapter_001", "adapter_002"]
    assert [r.name for r in bank.refused] == [str(bad)]


def test_progress_tells_every_stage(planted):
    seen = []
    Bank.fit(planted[:3], max_error=0.1, progress=lambda *what: seen.append(what))
    assert [s for s, done, total in seen if done == total] == [
        "reading", "finding shared directions", "measuring", "coding adapters",
    ]  # fmt: skip


def test_members_cost_at_most_40_bytes_of_metadata_a_module(planted, tmp_path):
    # nothing worth coding is left at this error: what remains is metadata, the file's header and the index's line
    bank = Bank.fit(planted, max_error=0.999)
    assert max(bank[name].bytes - 84 for name in bank.names) <= 40 * 4


def test_of_two_bases_that_the_model_cannot_tell_apart_the_better_bank_is_kept(tmp_path, monkeypatch):
    adapters = make_family(tmp_path, n=20, rank=8, hidden=256, layers=1, shared_rank=24, noise=0.2)
    ratios, errors = (40.0, 50.0, 60.0), (0.5, 0.75, 0.85)

    def measured():
        return (
            [Bank.fit(adapters, ratio=ratio).summary()["error"] for ratio in ratios],
            [Bank.fit(adapters, max_error=error).bytes for error in errors],
        )

    kept = measured()
    monkeypatch.setattr(fit, "_rival", lambda *_: None)
    first = measured()
    for ours, alone in zip(kept, first, strict=True):
        assert all(a <= b for a, b in zip(ours, alone, strict=True))
    assert kept[0][1] < 0.95 * first[0][1]  # there are two at this ratio
