import pytest
import torch

from adapterbank.errors import BankError
from adapterbank.subspace.diagnosis import combine, examine, spectrum_against_null
from adapterbank.subspace.updates import thin_svd


@pytest.fixture
def make_updates(make_family):
    return lambda **options: [thin_svd(*factors) for factors in make_family(**options)]


@pytest.fixture
def make_module(make_family):
    def make(k=4, members=None, **options):
        family = make_family(**options)
        return examine([thin_svd(*factors) for factors in family], [A for A, _, _ in family], k, members=members)

    return make


def test_a_planted_subspace_stands_out_from_its_null(make_updates):
    real_in, null_in, real_out, null_out = spectrum_against_null(make_updates(n=8, d_in=80, d_out=60)).at(4)
    assert min(real_in, real_out) > 0.999
    assert max(null_in, null_out) < 0.6


def test_unrelated_updates_do_not(make_updates):
    report = spectrum_against_null(make_updates(n=8, d_in=80, d_out=60, shared=-1))
    real_in, null_in, real_out, null_out = report.at(4)
    assert real_in == pytest.approx(null_in, abs=0.05)
    assert real_out == pytest.approx(null_out, abs=0.05)


def test_with_as_many_directions_as_rows_anything_is_explained(make_updates):
    # spec 2.13: "variance explained" is 1 by counting, hence the row count beside it
    report = spectrum_against_null(make_updates(n=3, r=2, shared=-1))
    assert report.rows == 6
    assert report.at(6) == pytest.approx((1, 1, 1, 1))
    assert report.at(99) == report.at(len(report.real_in))


def test_the_null_keeps_the_strength_of_each_update(make_updates):
    # one strong direction per adapter: even random ones explain more than flat ones would
    updates = make_updates(n=6, d_in=80, shared=-1)
    steep = [thin_svd(u.Vh * torch.tensor([[1.0], [0.01], [0.01]]), u.U) for u in updates]
    assert spectrum_against_null(steep).at(6)[1] > spectrum_against_null(updates).at(6)[1] + 0.2


def test_it_repeats_for_a_seed_and_ignores_the_gauge(make_family, regauge):
    family = make_family(noise=0.2)
    one = spectrum_against_null([thin_svd(*factors) for factors in family])
    two = spectrum_against_null([thin_svd(*regauge(factors)) for factors in family])
    torch.testing.assert_close(two.real_in, one.real_in, rtol=0, atol=1e-5)
    torch.testing.assert_close(two.null_out, one.null_out, rtol=0, atol=1e-5)
    other = spectrum_against_null([thin_svd(*factors) for factors in family], seed=1)
    assert not torch.equal(other.null_in, one.null_in)


def test_a_family_that_shares_is_told_from_one_that_does_not(make_module):
    shared = combine([make_module(n=8, d_in=80, d_out=60, noise=0.05, seed=seed) for seed in range(2)], k=4)
    private = combine([make_module(n=8, d_in=80, d_out=60, shared=-1, seed=seed) for seed in range(2)], k=4)
    assert shared.shares
    assert not private.shares
    assert max(shared.held_out_errors.values()) < 0.5 < min(private.held_out_errors.values())
    assert private.outliers == ()


def test_too_few_rows_are_never_called_sharing(make_module):
    # 6 rows, 6 directions: all is explained, by chance as well
    assert not combine([make_module(n=2, k=6, shared=-1)], k=6).shares


def test_errors_add_up_as_energies_over_modules(make_module):
    modules = [make_module(noise=0.3, seed=seed) for seed in range(2)]
    lost = sum(module.held_out.lost[1] for module in modules)
    energy = sum(module.held_out.energy[1] for module in modules)
    assert combine(modules, 4).held_out_errors[1] == pytest.approx((lost / energy) ** 0.5)


def test_adapters_may_miss_modules(make_module):
    family = combine([make_module(n=3, members=(0, 2, 5)), make_module(n=2, members=(2, 3), seed=1)], k=4)
    assert list(family.held_out_errors) == [0, 2, 3, 5]


def test_a_start_counts_when_most_common_modules_show_it(make_family):
    def module(pairs, seed):
        family = make_family(n=4, shared=-1, seed=seed)
        factors = [A for A, _, _ in family]
        for i, j in pairs:
            factors[j] = factors[i] + 0.1
        return examine([thin_svd(*f) for f in family], factors, 2)

    modules = [module([(0, 2)], 0), module([(0, 2)], 1), module([(0, 2), (1, 3)], 2)]
    assert combine(modules, 2).start_groups == ((0, 2),)


def test_a_stranger_among_them_is_an_outlier(make_family):
    family = make_family(n=9, noise=0.02) + make_family(n=1, shared=-1, seed=7)
    module = examine([thin_svd(*f) for f in family], [A for A, _, _ in family], 4)
    assert combine([module], 4).outliers == (9,)


def test_one_adapter_has_no_held_out_error(make_module):
    family = combine([make_module(n=1, k=2)], k=2)
    assert family.held_out_errors == {}
    assert family.outliers == ()


def test_bad_input_is_named(make_updates):
    updates = make_updates(n=2)
    with pytest.raises(BankError, match="2 updates, 1 A factors and 2 members don't match"):
        examine(updates, [updates[0].Vh], 2)
    with pytest.raises(BankError, match="at least one update"):
        spectrum_against_null([])
    with pytest.raises(BankError, match="no modules"):
        combine([], 2)
