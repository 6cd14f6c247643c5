"""What a diagnosis says of families whose making we know, and the sentence after a fit."""

import json

import pytest
import torch

from adapterbank import AdapterError, Bank, BankError, LoraAdapter, LoraFactors, MissingFileError
from adapterbank.bank import diagnose as module
from adapterbank.bank.advice import advice
from adapterbank.bank.diagnose import diagnose
from families import corrupt, make_family


def starts(n: int, *, together: bool, d: int = 96, rank: int = 4) -> list[LoraAdapter]:
    """Adapters whose A began alike, or not, and whose B have nothing in common."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(rank, d, generator=generator)
    adapters = []
    for i in range(n):
        start = common if together else torch.randn(rank, d, generator=generator)
        A = start + 0.1 * torch.randn(rank, d, generator=generator)
        B = torch.randn(d, rank, generator=generator)
        adapters.append(LoraAdapter.from_factors(f"a{i}", {"l.0.q": LoraFactors(A=A, B=B, scale=0.5)}, base="o/b"))
    return adapters


@pytest.fixture(scope="module")
def related(tmp_path_factory):
    out = tmp_path_factory.mktemp("related")
    return make_family(out, n=8, rank=3, hidden=64, layers=1, shared_rank=4, noise=0.05, gauge="random")


@pytest.fixture(scope="module")
def report(related):
    return diagnose(related)


@pytest.fixture
def few(monkeypatch):
    """Only the errors that the sentence quotes: most tests are not about the bytes."""
    monkeypatch.setattr(module, "TARGETS", (0.05, 0.2))


def test_a_planted_subspace_pays_and_beats_chance(report):
    assert report.advice.pays and not report.advice.only_start
    assert report.real_in > report.null_in + 0.15 and report.real_out > report.null_out + 0.15
    assert report.start_groups == () and report.outliers == ()
    assert all(0 < error < 0.3 for error in report.held_out_errors.values())
    assert all(row.saving > 0 for row in report.comparison)


def test_the_bank_needs_no_more_than_any_rival_at_the_same_error(report):
    for row in report.comparison:
        rivals = [size for method, size in row.bytes.items() if method not in ("bank", "alone") and size is not None]
        assert row.bytes["bank"] <= min([*rivals, row.bytes["alone"]])


def test_bytes_fall_as_the_error_grows(report):
    rows = report.comparison
    for method in rows[0].bytes:
        sizes = [float("inf") if row.bytes[method] is None else row.bytes[method] for row in rows]
        assert sizes == sorted(sizes, reverse=True)


def test_unrelated_adapters_are_told_that_sharing_does_not_pay(few):
    found = diagnose(starts(8, together=False))
    assert not found.advice.pays and "does not pay" in found.advice.text
    assert found.real_in == pytest.approx(found.null_in, abs=0.05)
    assert min(found.held_out_errors.values()) > 0.7


def test_a_common_random_start_is_called_that(few):
    found = diagnose(starts(8, together=True))
    assert found.start_groups == (tuple(f"a{i}" for i in range(8)),)
    assert found.advice.only_start
    assert "the random A that 8 of 8 adapters began with" in found.advice.text


def test_many_adapters_and_modules_are_sampled(related, monkeypatch, few):
    monkeypatch.setattr(module, "MOST_ADAPTERS", 5)
    monkeypatch.setattr(module, "MOST_MODULES", 1)
    found = diagnose(related)
    assert len(found.adapters) == 5 and found.of_adapters == 8
    assert len(found.modules) == 1 and found.of_modules == 2
    assert found.values == 5 * 3 * 128


def test_high_ranks_are_sampled_down(related, monkeypatch, few):
    monkeypatch.setattr(module, "MOST_ROWS", 24)
    found = diagnose([*related, f"again={related[0]}"])
    assert len(found.adapters) == 8 and found.of_adapters == 9
    assert {report.rows for report in found.modules} == {24}


def test_mixed_ranks_and_missing_modules_are_counted_as_they_are(tmp_path, few):
    paths = make_family(tmp_path, n=8, ranks=(2, 4), hidden=48, layers=2, shared_rank=6, drop_layers=0.4)
    found = diagnose(paths)
    shapes = [shape for path in paths for shape in LoraAdapter.load(path).modules.values()]
    assert found.values == sum(shape.rank * 96 for shape in shapes)
    assert sum(report.adapters for report in found.modules) == len(shapes)


def test_the_report_is_one_json_object_and_repeats_itself(related, few):
    first, second = diagnose(related[:3], seed=3), diagnose(related[:3], seed=3)
    assert first.to_json() == second.to_json()
    assert json.loads(first.to_json())["adapters"] == ["adapter_000", "adapter_001", "adapter_002"]


def test_one_adapter_has_nothing_to_share(related, few):
    found = diagnose(related[:1])
    assert not found.advice.pays and "single adapter" in found.advice.text
    assert found.held_out_errors == {} and found.modules[0].held_out_error is None


def test_zero_updates_are_no_reason_to_fail(related, tmp_path, few):
    zero = corrupt(related[0], "zero", tmp_path / "zero")
    other = corrupt(related[1], "zero", tmp_path / "other")
    assert diagnose([*related, zero]).advice.pays
    alone = diagnose([zero, other])
    assert alone.comparison == () and not alone.advice.pays


def test_bad_adapters_stop_it_or_are_listed(related, tmp_path, few):
    bad = corrupt(related[0], "nan", tmp_path / "bad")
    with pytest.raises(AdapterError, match=r"adapter 'bad', .*not finite"):
        diagnose([*related, bad])
    found = diagnose([*related, bad], skip_bad=True)
    assert [str(bad) in refused.name for refused in found.refused] == [True]
    assert len(found.adapters) == found.of_adapters == 8


def test_bad_arguments_are_refused(related, tmp_path):
    with pytest.raises(BankError, match="k must be at least 1"):
        diagnose(related, k=0)
    with pytest.raises(BankError, match="give a list"):
        diagnose(str(related[0]))
    with pytest.raises(BankError, match="at least one"):
        diagnose([])
    with pytest.raises(MissingFileError, match="does not exist"):
        diagnose([tmp_path / "nothing"])


# --- after a fit ----------------------------------------------------------------------------------------------------


def test_after_a_fit_on_related_adapters_sharing_has_paid(related):
    found = advice(Bank.fit(related, max_error=0.3), related)
    assert found.pays and 0.05 < found.saving < 1


def test_after_a_fit_on_unrelated_adapters_it_says_that_nothing_is_shared():
    adapters = starts(6, together=False)
    found = advice(Bank.fit(adapters, max_error=0.3), adapters)
    assert not found.pays and "coded alone" in found.text


def test_after_a_fit_a_common_start_is_called_that():
    adapters = starts(8, together=True)
    found = advice(Bank.fit(adapters, max_error=0.3), adapters)
    assert found.pays and found.only_start


def test_after_a_fit_of_a_fixed_size_it_names_the_way_out():
    adapters = starts(6, together=False)
    for arguments in ({"k": 4}, {"k": 4, "quantize": False}, {"k": 4, "method": "eigenlora"}):
        found = advice(Bank.fit(adapters, **arguments), adapters)
        assert not found.pays and found.saving < 0
        assert "leave out --method, -k" in found.text or "no better than none" in found.text


def test_forced_directions_on_unrelated_adapters_are_told_to_cost():
    adapters = starts(6, together=False)
    found = advice(Bank.fit(adapters, k=8, max_error=0.3), adapters)
    assert not found.pays and found.saving < 0


def test_after_a_fit_of_one_adapter_there_is_nothing_to_share(related):
    assert "single adapter" in advice(Bank.fit(related[:1], max_error=0.1), related[:1]).text


def test_the_sentence_does_not_need_adapters_that_were_left_out(related, tmp_path):
    bad = corrupt(related[0], "nan", tmp_path / "bad")
    given = [*related[:4], f"x={bad}"]
    assert advice(Bank.fit(given, max_error=0.3, skip_bad=True), given).text
