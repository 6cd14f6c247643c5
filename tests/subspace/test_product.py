from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterbank.errors import BankError
from adapterbank.subspace.product import (
    equal_weights,
    fit_product,
    harmonic_size,
    project,
    reconstruct,
)
from adapterbank.subspace.updates import ThinUpdate, difference_norm, relative_error, thin_svd


@pytest.fixture
def make_updates(make_family):
    return lambda **options: [thin_svd(*factors) for factors in make_family(**options)]


def lost_energy(updates, basis):
    """Weighted squared error: what a fit minimises."""
    rebuilt = [reconstruct(project(update, basis), basis) for update in updates]
    pairs = zip(updates, equal_weights(updates), rebuilt, strict=True)
    return sum((weight * difference_norm(update, *factors)) ** 2 for update, weight, factors in pairs)


def dense(update):
    return (update.U * update.S) @ update.Vh


def test_it_is_exact_at_full_rank(make_updates):
    updates = make_updates(shared=-1)
    basis = fit_product(updates, 15, 15)
    assert max(relative_error(update, *reconstruct(project(update, basis), basis)) for update in updates) < 1e-5


def test_it_is_exact_at_the_planted_rank_and_not_below(make_updates):
    updates = make_updates(shared=4)
    assert lost_energy(updates, fit_product(updates, 4, 4)) < 1e-10
    assert lost_energy(updates, fit_product(updates, 3, 4)) > 1e-3


def test_the_bases_are_the_leading_eigenvectors_of_the_weighted_moments(make_updates):
    updates = make_updates(shared=-1)
    basis = fit_product(updates, 4, 3)
    parts = [weight * dense(update).double() for update, weight in zip(updates, equal_weights(updates), strict=True)]
    moment_in, moment_out = sum(dW.T @ dW for dW in parts), sum(dW @ dW.T for dW in parts)
    for moment, kept in ((moment_in, basis.V.double()), (moment_out, basis.U.T.double())):
        values = torch.linalg.eigvalsh(moment).flip(0)
        torch.testing.assert_close((kept @ moment @ kept.T).diagonal(), values[: len(kept)], rtol=1e-5, atol=0)
    torch.testing.assert_close(basis.V @ basis.V.T, torch.eye(4), rtol=0, atol=1e-6)
    torch.testing.assert_close(basis.U.T @ basis.U, torch.eye(3), rtol=0, atol=1e-6)


def test_with_one_side_whole_the_error_is_the_discarded_energy_of_the_other(make_updates):
    # Eckart-Young for the stacked updates: this pins optimality
    updates = make_updates(shared=-1)
    basis = fit_product(updates, 5, 15)
    assert lost_energy(updates, basis) == pytest.approx(float(basis.eigenvalues_in[5:].sum()), rel=1e-4)


def test_the_error_is_at_most_what_both_sides_discard(make_updates):
    # the HOSVD's bound: within a factor sqrt(2) of the best bases of these sizes
    updates = make_updates(shared=-1)
    basis = fit_product(updates, 5, 4)
    bound = float(basis.eigenvalues_in[5:].sum() + basis.eigenvalues_out[4:].sum())
    assert lost_energy(updates, basis) <= bound * (1 + 1e-5)


@settings(max_examples=25, deadline=None)
@given(k_in=st.integers(1, 12), k_out=st.integers(1, 12), seed=st.integers(0, 999))
def test_a_hooi_sweep_never_raises_the_error(k_in, k_out, seed):
    generator = torch.Generator().manual_seed(seed)
    updates = [
        thin_svd(torch.randn(3, 14, generator=generator), torch.randn(12, 3, generator=generator)) for _ in range(4)
    ]
    errors = [lost_energy(updates, fit_product(updates, k_in, k_out, hooi_sweeps=sweeps)) for sweeps in range(4)]
    assert all(later <= before + 1e-5 for before, later in pairwise(errors))


def test_hooi_keeps_the_asked_size_where_the_other_side_is_narrow(make_updates):
    # one output direction leaves only n useful input directions; the rest still make an orthonormal basis
    updates = make_updates(n=3, shared=-1)
    basis = fit_product(updates, 7, 1, hooi_sweeps=1)
    torch.testing.assert_close(basis.V @ basis.V.T, torch.eye(7), rtol=0, atol=1e-5)


def test_gauge_alpha_and_order_do_not_matter(make_family, regauge):
    # E8, E9: only the updates count
    family = make_family(shared=-1)
    one = fit_product([thin_svd(*factors) for factors in family], 4, 4, hooi_sweeps=1)
    other = fit_product([thin_svd(*regauge(factors)) for factors in reversed(family)], 4, 4, hooi_sweeps=1)
    torch.testing.assert_close(other.V, one.V, rtol=0, atol=2e-4)
    torch.testing.assert_close(other.U.T @ one.U, torch.eye(4), rtol=0, atol=2e-4)


def test_a_loud_adapter_counts_no_more_than_another(make_updates):
    updates = make_updates(shared=-1)
    louder = [ThinUpdate(U=updates[0].U, S=1000 * updates[0].S, Vh=updates[0].Vh), *updates[1:]]
    torch.testing.assert_close(fit_product(louder, 4, 4).V, fit_product(updates, 4, 4).V, rtol=0, atol=1e-4)
    weighted = fit_product(louder, 3, 3, weights=[1.0] * 5)
    assert relative_error(louder[0], *reconstruct(project(louder[0], weighted), weighted)) < 1e-2


def test_zero_updates_cost_nothing(make_updates):
    updates = make_updates()
    zero = thin_svd(torch.zeros(2, 24), torch.zeros(18, 2))
    basis = fit_product([zero, *updates], 4, 4)
    torch.testing.assert_close(basis.V, fit_product(updates, 4, 4).V, rtol=0, atol=1e-5)
    assert relative_error(zero, *reconstruct(project(zero, basis), basis)) == 0


def test_coefficients_are_least_squares_and_balanced(make_updates):
    updates = make_updates(shared=-1)
    basis = fit_product(updates, 5, 4)
    coefficients = project(updates[0], basis)
    torch.testing.assert_close(coefficients.core, basis.U.T @ dense(updates[0]) @ basis.V.T, rtol=1e-4, atol=1e-4)
    # singular vectors share their strength evenly between the sides, as far as the bases hold them
    whole = fit_product(updates, 15, 15)
    pair = project(updates[0], whole)
    torch.testing.assert_close(pair.coef_A @ pair.coef_A.T, pair.coef_B.T @ pair.coef_B, rtol=1e-4, atol=1e-4)


def test_ranks_may_differ(make_family):
    # E1, E24
    updates = [thin_svd(*make_family(n=1, r=r, seed=0)[0]) for r in (1, 2, 7)]
    basis = fit_product(updates, 4, 4)
    assert [project(update, basis).coef_A.shape[0] for update in updates] == [1, 2, 7]


@pytest.mark.parametrize(("k_in", "k_out"), [(3, 5), (8, 8), (2, 9)])
def test_a_core_is_smaller_than_the_pair_exactly_above_the_harmonic_size(k_in, k_out):
    for r in range(1, 12):
        assert (k_in * k_out < r * (k_in + k_out)) == (r > harmonic_size(k_in, k_out))


def test_bad_requests_say_what_is_possible(make_updates):
    # E3
    updates = make_updates(n=2)
    with pytest.raises(BankError, match=r"k=7 is outside \[1, 6\]: 6 rows of 24 features"):
        fit_product(updates, 7, 1)
    with pytest.raises(BankError, match="no updates"):
        fit_product([], 1, 1)
