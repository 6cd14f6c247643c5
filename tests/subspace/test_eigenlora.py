import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterbank.errors import BankError
from adapterbank.subspace.eigenlora import RowStack, canonical, fit_rows, stack_factors, theorem1_bound
from adapterbank.subspace.updates import balanced, relative_error, thin_svd, truncate

MODES = ["affine", "drop", "none"]


def lost_energy(rows, basis):
    return float((rows - basis.reconstruct(basis.project(rows))).square().sum())


def projector(basis):
    return basis.components.T @ basis.components


def test_adapters_of_different_ranks_stack(make_family):
    # E1: rank_pattern, and adapters without the module simply aren't in the list
    factors = [make_family(n=1, r=r)[0] for r in (1, 2, 5)]
    rows_in, rows_out = stack_factors(factors)
    assert rows_in.shape == (8, 24)
    assert rows_out.shape == (8, 18)
    assert fit_rows(rows_in, 7).row_count == 8
    with pytest.raises(BankError, match="no factors"):
        stack_factors([])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("m", [12, 40])
def test_components_are_the_orthonormal_singular_vectors_of_the_stack(make_rows, mode, m):
    # E2, E6: the Gram route (fewer rows than features) and the moment route equal the direct SVD
    rows = make_rows(m=m, rank=6)
    basis = fit_rows(rows, 3, mode)
    centred = rows if mode == "none" else rows - rows.mean(dim=0)
    _, S, Vh = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(projector(basis), Vh[:3].T @ Vh[:3], rtol=0, atol=1e-4)
    torch.testing.assert_close(basis.singular_values[:6], S[:6], rtol=1e-3, atol=1e-4)
    assert (basis.components @ basis.components.T - torch.eye(3)).abs().max() < 1e-6


@pytest.mark.parametrize(("mode", "bound"), [("affine", 5), ("drop", 5), ("none", 6)])
def test_k_above_the_rank_bound_names_it(make_rows, mode, bound):
    # E3: centring takes one; the official code silently returns directions that aren't orthonormal here
    rows = make_rows(m=6)
    assert fit_rows(rows, bound, mode).components.shape == (bound, 20)
    with pytest.raises(BankError, match=rf"k={bound + 1} is outside \[1, {bound}\]: 6 stacked rows of 20 features"):
        fit_rows(rows, bound + 1, mode)


def test_every_member_comes_back_at_full_rank(make_rows):
    # E4, E22: affine exactness for members of the span
    rows = make_rows(m=8)
    assert lost_energy(rows, fit_rows(rows, 7)) < 1e-10 * float(rows.square().sum())
    mixture = torch.softmax(torch.arange(8.0), dim=0)[None] @ rows  # weights sum to 1: in the affine span
    assert lost_energy(mixture, fit_rows(rows, 7)) < 1e-10 * float(rows.square().sum())


@pytest.mark.parametrize("mode", ["affine", "none"])
def test_the_error_equals_the_discarded_energy(make_rows, mode):
    # E4: Eckart-Young pins optimality
    rows = make_rows(m=10)
    for k in (1, 3, 6):
        basis = fit_rows(rows, k, mode)
        assert lost_energy(rows, basis) == pytest.approx(float(basis.singular_values[k:].square().sum()), rel=1e-3)


def test_dropping_the_mean_loses_what_the_paper_keeps(make_rows):
    # spec 0 (4): the official code never adds the mean back
    rows = make_rows(m=8) + 3
    assert fit_rows(rows, 7, "drop").mean.count_nonzero() == 0
    assert lost_energy(rows, fit_rows(rows, 7, "affine")) < 1e-3 * lost_energy(rows, fit_rows(rows, 7, "drop"))


@pytest.mark.parametrize("mode", MODES)
def test_the_order_of_adapters_and_rows_does_not_matter(make_rows, mode):
    # E5
    rows = make_rows(m=9)
    shuffled = rows[torch.randperm(9, generator=torch.Generator().manual_seed(0))]
    one, other = fit_rows(rows, 4, mode), fit_rows(shuffled, 4, mode)
    torch.testing.assert_close(projector(other), projector(one), rtol=0, atol=1e-4)
    torch.testing.assert_close(other.components, one.components, rtol=0, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), mode=st.sampled_from(MODES), m=st.integers(4, 40))
def test_a_stream_in_chunks_and_merges_equals_the_batch(data, mode, m):
    # E6: the limitation named in the paper's summary, cost and instability with many LoRAs
    rows = torch.randn(m, 9, generator=torch.Generator().manual_seed(m)) * 0.5 ** torch.arange(9) + 1
    left, right = RowStack(9, mode), RowStack(9, mode)
    cut = data.draw(st.integers(0, m))
    for stack, part in ((left, rows[:cut]), (right, rows[cut:])):
        for chunk in part.split(data.draw(st.integers(1, m))):
            stack.add(chunk)
    left.merge(right)
    one, other = fit_rows(rows, 2, mode), left.basis(2)
    assert left.row_count == other.row_count == m
    torch.testing.assert_close(other.mean, one.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(projector(other), projector(one), rtol=0, atol=1e-3)
    torch.testing.assert_close(other.singular_values[:2], one.singular_values[:2], rtol=1e-4, atol=1e-4)


def test_stacks_of_different_modes_do_not_merge():
    with pytest.raises(BankError, match="mean='none' can't be merged into one with mean='affine'"):
        RowStack(4).merge(RowStack(4, "none"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_rows_are_cast_up(make_rows, dtype):
    # E7
    rows = make_rows(m=7).to(dtype)
    basis = fit_rows(rows, 6)
    assert basis.components.dtype == torch.float32
    torch.testing.assert_close(basis.components, fit_rows(rows.float(), 6).components)
    assert lost_energy(rows.float(), basis) < 1e-8 * float(rows.float().square().sum())


def test_balancing_makes_the_basis_independent_of_the_gauge(make_family, regauge):
    # E8
    family = make_family(shared=-1)
    other = [regauge(factors, seed) for seed, factors in enumerate(family)]
    for rows, others in zip(stack_factors(family, "balanced"), stack_factors(other, "balanced"), strict=True):
        torch.testing.assert_close(projector(fit_rows(others, 4)), projector(fit_rows(rows, 4)), rtol=0, atol=1e-3)


def test_without_it_the_basis_moves(make_family, regauge):
    # E8: the paper's behaviour, documented rather than repaired in this mode
    family = make_family(shared=-1)
    rows, _ = stack_factors(family)
    others, _ = stack_factors([regauge(factors, seed) for seed, factors in enumerate(family)])
    assert (projector(fit_rows(others, 4)) - projector(fit_rows(rows, 4))).abs().max() > 0.05


def test_qr_makes_uncentred_bases_independent_of_the_gauge(make_family, regauge):
    # E8: the row space of A is what counts; a rotation within it stays, so a mean row still moves
    family = make_family(shared=-1)
    other = [regauge(factors, seed) for seed, factors in enumerate(family)]
    for rows, others in zip(stack_factors(family, "qr"), stack_factors(other, "qr"), strict=True):
        one, two = fit_rows(rows, 4, "none"), fit_rows(others, 4, "none")
        torch.testing.assert_close(projector(two), projector(one), rtol=0, atol=1e-3)


@pytest.mark.parametrize("gauge", ["none", "balanced", "qr"])
def test_every_gauge_carries_the_same_update(make_family, gauge):
    for A, B, scale in make_family():
        A2, B2 = canonical(A, B, scale, gauge)
        torch.testing.assert_close(B2 @ A2, scale * B @ A, rtol=1e-4, atol=1e-4)


def test_alpha_and_rslora_are_folded_in(make_family):
    # E9: equal updates give equal banks; twice alpha is twice the update
    family = make_family()
    plain = stack_factors(family)
    rewritten = stack_factors([(A, B / math.sqrt(len(A)), scale * math.sqrt(len(A))) for A, B, scale in family])
    doubled = stack_factors([(A, B, 2 * scale) for A, B, scale in family])
    for rows, same in zip(plain, rewritten, strict=True):
        torch.testing.assert_close(fit_rows(same, 3).components, fit_rows(rows, 3).components, rtol=0, atol=1e-4)
    torch.testing.assert_close(doubled[1], 2 * plain[1])


def test_weights_scale_whole_adapters(make_family):
    # E10
    family = make_family(n=2)
    rows, _ = stack_factors(family, weights=[1.0, 0.0])
    assert rows[3:].count_nonzero() == 0
    torch.testing.assert_close(rows[:3], family[0][0])


@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 8), k=st.integers(1, 6), seed=st.integers(0, 999))
def test_theorem_1_holds(m, k, seed):
    # E11; float64 throughout, because a small residual of float32 rows is mostly rounding
    generator = torch.Generator().manual_seed(seed)
    components, inside, noise = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((7, k), (m, k), (m, 7))
    )
    components = torch.linalg.qr(components).Q.T
    rows = inside @ components + 0.2 * noise
    projected = rows @ components.T @ components
    error = float((rows - projected).norm())
    bound = theorem1_bound(rows, components)
    assert error <= bound.by_original * (1 + 1e-9)
    assert error <= bound.by_projection * (1 + 1e-9)


def test_theorem_1_is_tight_for_one_row_and_open_outside():
    # E11: the paper chains both bounds with "="; they differ as soon as the angles do
    E = torch.eye(3)[:1]
    row = torch.tensor([[3.0, 4.0, 0.0]])
    assert theorem1_bound(row, E) == pytest.approx((0.8, 4.0, 4.0))
    both = theorem1_bound(torch.cat([row, torch.tensor([[1.0, 0.0, 0.0]])]), E)
    assert both.by_original != pytest.approx(both.by_projection)
    outside = theorem1_bound(torch.eye(3)[1:2], E)
    assert outside.delta == 1
    assert math.isinf(outside.by_projection)
    assert theorem1_bound(torch.zeros(2, 3), E) == (0, 0, 0)


def test_projection_is_least_squares(make_rows):
    # E20
    basis = fit_rows(make_rows(), 4)
    new = make_rows(m=5, seed=1)
    solution = torch.linalg.lstsq(basis.components.T, (new - basis.mean).T).solution.T
    torch.testing.assert_close(basis.project(new), solution, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_projection_is_idempotent(make_rows, mode):
    # E21
    basis = fit_rows(make_rows(), 4, mode)
    once = basis.reconstruct(basis.project(make_rows(m=5, seed=1)))
    torch.testing.assert_close(basis.reconstruct(basis.project(once)), once, rtol=1e-4, atol=1e-5)


def test_the_error_never_rises_with_k(make_rows):
    # E23, also for adapters outside the bank
    rows, new = make_rows(), make_rows(m=5, seed=1)
    errors = [lost_energy(new, fit_rows(rows, k)) for k in range(1, 12)]
    assert all(later <= before * (1 + 1e-5) for before, later in pairwise(errors))


def test_an_adapter_of_another_rank_projects(make_family):
    # E24
    rows, _ = stack_factors(make_family(r=3))
    A, _, _ = make_family(n=1, r=7, seed=1)[0]
    assert fit_rows(rows, 4).project(A).shape == (7, 4)


def test_small_errors_of_the_factors_can_be_a_large_error_of_the_update():
    # E25: what A loses may be just what B amplifies, so only the update's error is ever shown as quality
    A, B = torch.diag(torch.tensor([1.0, 0.1])), torch.diag(torch.tensor([0.1, 1.0]))
    rows = fit_rows(A, 1, "none")
    A2 = rows.reconstruct(rows.project(A))
    assert float((A - A2).norm() / A.norm()) < 0.1
    assert relative_error(thin_svd(A, B), A2, B) > 0.7


def test_a_smaller_coefficient_rank_takes_the_leading_singular_vectors(make_family):
    # E26: balance, truncate, project
    family = make_family(shared=4)
    rows_in, rows_out = stack_factors(family, "balanced")
    side_in, side_out = fit_rows(rows_in, 4, "none"), fit_rows(rows_out, 4, "none")
    svd = thin_svd(*family[0])
    A, B = balanced(truncate(svd, 2))
    coef_A, coef_B = side_in.project(A), side_out.project(B.T)
    assert coef_A.shape == (2, 4)
    error = relative_error(svd, side_in.reconstruct(coef_A), side_out.reconstruct(coef_B).T)
    assert error == pytest.approx(float(svd.S[2:].norm() / svd.S.norm()), rel=1e-3)
