import pytest
import torch

from adapterbank.errors import BankError
from adapterbank.subspace.heldout import leave_one_out, outliers
from adapterbank.subspace.product import fit_product, project, reconstruct
from adapterbank.subspace.updates import relative_error, thin_svd


@pytest.fixture
def make_updates(make_family):
    return lambda **options: [thin_svd(*factors) for factors in make_family(**options)]


def test_the_held_out_error_is_that_of_a_basis_fitted_on_the_others(make_updates):
    updates = make_updates(noise=0.3)
    report = leave_one_out(updates, 4)
    basis = fit_product(updates[:2] + updates[3:], 4, 4)
    expected = relative_error(updates[2], *reconstruct(project(updates[2], basis), basis))
    assert report.errors[2] == pytest.approx(expected, rel=1e-4)


def test_a_shared_subspace_predicts_the_unseen_and_private_ones_do_not(make_updates):
    assert max(leave_one_out(make_updates(shared=4), 4).errors) < 1e-4
    private = leave_one_out(make_updates(shared=-1, d_in=200, d_out=200), 8)
    assert min(private.errors) > 0.95
    # the error inside the fit hides it
    assert sum(private.lost_inside) < 0.9 * sum(private.energy)


def test_more_adapters_than_folds_are_held_out_in_groups(make_updates):
    updates = make_updates(n=7, noise=0.3)
    report = leave_one_out(updates, 4, folds=3)
    basis = fit_product([updates[i] for i in (1, 2, 4, 5)], 4, 4)  # fold 0 is 0, 3, 6
    expected = relative_error(updates[3], *reconstruct(project(updates[3], basis), basis))
    assert report.errors[3] == pytest.approx(expected, rel=1e-4)


def test_k_is_bounded_by_what_the_others_leave(make_updates):
    report = leave_one_out(make_updates(n=2, r=3), 99)
    assert (report.k_in, report.k_out) == (3, 3)
    with pytest.raises(BankError, match="at least two"):
        leave_one_out(make_updates(n=1), 2)


def test_a_zero_update_has_no_error(make_updates):
    updates = [*make_updates(), thin_svd(torch.zeros(2, 24), torch.zeros(18, 2))]
    assert leave_one_out(updates, 4).errors[-1] == 0


def test_outliers_are_far_above_the_median_only():
    assert outliers([0.1, 0.12, 0.11, 0.9, 0.1]) == (3,)
    assert outliers([0.5, 0.5, 0.5, 0.51]) == ()
    assert outliers([0.5, 0.5, 0.5, 0.01]) == ()
    assert outliers([]) == ()
