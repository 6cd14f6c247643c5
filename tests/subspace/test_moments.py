import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterbank.errors import BankError
from adapterbank.subspace import moments
from adapterbank.subspace.moments import SecondMoment, top_eigenpairs


def moment_of(*chunks, d=None, **options):
    moment = SecondMoment(chunks[0].shape[1] if d is None else d, **options)
    for chunk in chunks:
        moment.add(chunk)
    return moment


def projector(moment, k):
    components, _ = moment.basis(k)
    return components.T @ components


@pytest.fixture
def truncating(monkeypatch):
    """Dimensions above 8 use the truncated form, keeping 6 directions."""
    monkeypatch.setattr(moments, "DENSE_LIMIT", 8)
    return lambda *chunks: moment_of(*chunks, max_rows=6)


@pytest.mark.parametrize("m", [5, 19, 20, 21, 300])
@pytest.mark.parametrize("expect", [None, 300])
def test_the_basis_is_that_of_a_direct_svd_in_every_exact_form(make_rows, m, expect):
    # E2, E6: rows below d, the d x d moment from d on
    rows = make_rows(m=m, d=20, rank=5)
    _, S, Vh = torch.linalg.svd(rows, full_matrices=False)
    moment = moment_of(*rows.split(7), expect_rows=expect)
    components, values = moment.basis(3)
    torch.testing.assert_close(components.abs(), Vh[:3].abs(), rtol=0, atol=1e-4)
    torch.testing.assert_close(values[:3].sqrt().float(), S[:3], rtol=1e-4, atol=1e-4)
    assert (components @ components.T - torch.eye(3)).abs().max() < 1e-6
    assert moment.total == pytest.approx(float(rows.square().sum()), rel=1e-6)
    torch.testing.assert_close(moment.spectrum().sum(), torch.tensor(moment.total).double(), rtol=1e-5, atol=0)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), m=st.integers(8, 60), seed=st.integers(0, 99))
def test_order_chunks_and_merging_tree_do_not_matter(data, m, seed):
    # E6: joining sketches is associative; 1e-5 of the largest eigenvalue is the stated tolerance
    d, k = 12, 3
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(m, d, generator=generator) * 0.5 ** torch.arange(d)
    once = moment_of(rows)
    order = torch.tensor(data.draw(st.permutations(range(m))))
    parts = [moment_of(part) for part in rows[order].split(data.draw(st.integers(1, m)))]
    while len(parts) > 1:
        i = data.draw(st.integers(0, len(parts) - 2))
        parts[i].merge(parts.pop(i + 1))
    assert parts[0].rows_seen == m
    assert parts[0].rank_bound == once.rank_bound
    largest = float(once.spectrum()[0])
    assert (parts[0].spectrum() - once.spectrum()).abs().max() < 1e-5 * largest
    captured = [float((rows @ projector(moment, k)).square().sum()) for moment in (once, parts[0])]
    assert captured[1] == pytest.approx(captured[0], abs=1e-5 * largest)


def test_one_large_chunk_is_as_good_as_many(truncating, make_rows):
    # a chunk far above what is held must not be held at once
    rows = make_rows(m=1500, rank=4)
    moment = truncating(rows)
    torch.testing.assert_close(rows @ projector(moment, 4), rows, rtol=0, atol=1e-3)
    assert len(moment.state_dict()["rows"]) <= 12


def test_merging_leaves_the_other_as_it_was(make_rows):
    for m in (5, 50):
        other = moment_of(make_rows(m=m))
        before = other.state_dict()
        SecondMoment(20).merge(other)
        joined = moment_of(make_rows(m=50, seed=1))
        joined.merge(other)
        joined.add(make_rows())
        after = other.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())


@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 80), chunk=st.integers(1, 30), seed=st.integers(0, 99))
def test_truncation_captures_the_best_energy_less_what_it_lost(m, chunk, seed):
    # Ky Fan: the dropped part is positive semidefinite and its trace is counted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moments, "DENSE_LIMIT", 8)
        rows = torch.randn(m, 20, generator=torch.Generator().manual_seed(seed)) * 0.9 ** torch.arange(20)
        parts = rows.split(chunk)
        left, right = moment_of(*parts[::2], d=20, max_rows=6), moment_of(*parts[1::2], d=20, max_rows=6)
        left.merge(right)
        k = min(3, left.rank_bound)
        captured = float((rows @ projector(left, k)).square().sum())
    best = float(torch.linalg.svdvals(rows)[:k].square().sum())
    assert best - left.lost - 1e-3 <= captured <= best + 1e-3
    assert left.total == pytest.approx(float(rows.square().sum()), rel=1e-5)


def test_truncation_is_exact_while_the_rank_fits(truncating, make_rows):
    rows = make_rows(m=60, d=20, rank=4)
    moment = truncating(*rows.split(5))
    assert moment.lost < 1e-9 * moment.total
    torch.testing.assert_close(rows @ projector(moment, 4), rows, rtol=0, atol=1e-4)


def test_the_size_does_not_grow_with_the_rows(truncating, make_rows):
    def size(moment):
        return sum(tensor.numel() for tensor in moment.state_dict().values())

    dense = [size(moment_of(*make_rows(m=m, d=8).split(9))) for m in (100, 1000)]
    assert dense[0] == dense[1]
    assert all(size(truncating(*make_rows(m=m).split(9))) <= 12 * 20 + 6 for m in (100, 1000))


@pytest.mark.parametrize("m", [0, 5, 50])
def test_a_saved_partial_fit_goes_on_bit_for_bit(make_rows, m):
    first, then = make_rows(m=m, d=20, rank=5), make_rows(m=9, seed=1)
    moment = moment_of(first)
    loaded = SecondMoment.from_state(moment.state_dict())
    for one in (moment, loaded):
        one.add(then)
    assert (loaded.total, loaded.rows_seen, loaded.rank_bound) == (moment.total, moment.rows_seen, moment.rank_bound)
    assert torch.equal(loaded.basis(4)[0], moment.basis(4)[0])


@pytest.mark.parametrize(
    "change",
    [
        {"counts": None},
        {"counts": torch.zeros(2, dtype=torch.long)},
        {"rows": None},
        {"rows": torch.zeros(3, 7)},
        {"rows": None, "moment": torch.zeros(3, 20)},
        {"counts": torch.tensor([-4, 1, 1, 0])},
    ],
)
def test_a_foreign_state_is_refused(make_rows, change):
    state = {name: value for name, value in (moment_of(make_rows()).state_dict() | change).items() if value is not None}
    with pytest.raises(BankError, match="not the state of a second moment"):
        SecondMoment.from_state(state)


def test_k_above_the_rank_bound_names_the_bound(make_rows):
    # E3
    moment = moment_of(make_rows(m=6))
    with pytest.raises(BankError, match=r"k=7 is outside \[1, 6\]: 6 rows of 20 features"):
        moment.basis(7)
    with pytest.raises(BankError, match=r"k=0 is outside"):
        moment.basis(0)


@pytest.mark.parametrize("m", [12, 40])
def test_components_beyond_the_rank_are_orthonormal_with_no_energy(make_rows, m):
    moment = moment_of(make_rows(m=m, rank=2), torch.zeros(3, 20))
    components, values = moment.basis(10)
    torch.testing.assert_close(components @ components.T, torch.eye(10), rtol=0, atol=1e-5)
    assert values[2:].max() < 1e-6 * values[0]


def test_only_zero_rows_still_give_a_basis():
    components, values = moment_of(torch.zeros(4, 9)).basis(3)
    torch.testing.assert_close(components @ components.T, torch.eye(3))
    assert values.sum() == 0


def test_signs_are_deterministic(make_rows):
    # E5: the entry of largest magnitude of each component is positive
    for m in (9, 90):
        components, _ = moment_of(make_rows(m=m)).basis(5)
        assert (components.gather(1, components.abs().argmax(dim=1, keepdim=True)) > 0).all()


def test_rows_are_copied_and_16_bit_rows_are_taken(make_rows):
    # E7; and the caller's tensor may be a view of a file that closes
    rows = make_rows().bfloat16()
    moment = moment_of(rows)
    before = moment.basis(3)[0]
    exact = moment_of(rows.float()).basis(3)[0]
    rows.zero_()
    torch.testing.assert_close(before, exact)
    assert torch.equal(moment.basis(3)[0], before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_rows_are_refused(make_rows, bad):
    rows = make_rows()
    rows[0, 0] = bad
    with pytest.raises(BankError, match="nan or inf"):
        moment_of(rows)
    with pytest.raises(BankError, match="rows of 20 features don't fit a moment of 7"):
        moment_of(rows, d=7)
    with pytest.raises(BankError, match="a moment of 3 features doesn't fit one of 4"):
        SecondMoment(4).merge(SecondMoment(3))
    with pytest.raises(BankError, match="needs d >= 1"):
        SecondMoment(0)


@pytest.mark.parametrize(("shared", "tolerance"), [(8, 1e-5), (600, 0.02)])
def test_the_randomised_range_finder_captures_the_best_energy_to_its_tolerance(shared, tolerance):
    # E6: 2 % is for a spectrum without any gap, where no basis is worth having
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(600, shared, generator=generator) @ torch.randn(shared, 640, generator=generator)
    rows = rows / shared**0.5 + 0.05 * torch.randn(600, 640, generator=generator)
    gram = rows @ rows.T
    values, vectors = top_eigenpairs(gram, 8)
    best = float(torch.linalg.eigvalsh(gram.double())[-8:].sum())
    assert vectors.shape == (600, 8)
    assert float(values.sum()) == pytest.approx(best, rel=tolerance)
    assert float((vectors.T @ gram @ vectors).trace()) == pytest.approx(best, rel=tolerance)
    assert torch.equal(top_eigenpairs(gram, 8)[1], vectors)
