import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterbank.errors import BankError
from adapterbank.subspace.updates import (
    balanced,
    difference_norm,
    relative_error,
    thin_svd,
    truncate,
    update_norm,
)

SIZES = st.integers(1, 9)


def random_factors(r, d_in, d_out, seed, rank=None):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(r, d_in, generator=generator)
    B = torch.randn(d_out, r, generator=generator)
    if rank is not None:  # repeat the leading rows, which leaves the update rank deficient
        A = A[torch.arange(r) % max(rank, 1)] * (rank > 0)
    return A, B


@settings(max_examples=60, deadline=None)
@given(r=SIZES, d_in=SIZES, d_out=SIZES, seed=st.integers(0, 99), rank=st.sampled_from([None, 0, 1, 2]))
def test_the_svd_is_the_update_whatever_the_shapes_and_rank(r, d_in, d_out, seed, rank):
    A, B = random_factors(r, d_in, d_out, seed, rank)
    svd = thin_svd(A, B, -0.5)
    p = min(r, d_in, d_out)
    assert svd.S.shape == (p,)
    assert (svd.S.diff() <= 0).all()
    torch.testing.assert_close((svd.U * svd.S) @ svd.Vh, -0.5 * B @ A, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(svd.U.T @ svd.U, torch.eye(p), rtol=0, atol=2e-6)
    torch.testing.assert_close(svd.Vh @ svd.Vh.T, torch.eye(p), rtol=0, atol=2e-6)


def test_singular_values_are_those_of_the_dense_update():
    A, B = random_factors(4, 30, 20, seed=1)
    torch.testing.assert_close(thin_svd(A, B, 2.0).S, torch.linalg.svdvals(2 * B @ A)[:4], rtol=1e-5, atol=1e-5)


def test_another_gauge_or_split_of_the_scale_gives_the_same_svd(make_family, regauge):
    # E8, E9: (A, B) -> (G A, B G^-1) and alpha doubled while B is halved leave the update alone
    for factors in make_family():
        one, two = thin_svd(*factors), thin_svd(*regauge(factors))
        torch.testing.assert_close(two.S, one.S, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(two.Vh, one.Vh, rtol=0, atol=1e-4)
        torch.testing.assert_close(two.U, one.U, rtol=0, atol=1e-4)


def test_doubling_alpha_doubles_the_update_and_nothing_else(make_family):
    # E9
    A, B, scale = make_family()[0]
    one, two = thin_svd(A, B, scale), thin_svd(A, B, 2 * scale)
    torch.testing.assert_close(two.S, 2 * one.S)
    torch.testing.assert_close(two.Vh, one.Vh)


def test_signs_are_fixed_by_the_largest_entry_of_each_input_direction(make_family):
    # E5: the sign of the whole update goes to U
    A, B, _ = make_family()[0]
    plus, minus = thin_svd(A, B, 1.0), thin_svd(A, B, -1.0)
    lead = plus.Vh.gather(1, plus.Vh.abs().argmax(dim=1, keepdim=True))
    assert (lead > 0).all()
    torch.testing.assert_close(minus.Vh, plus.Vh)
    torch.testing.assert_close(minus.U, -plus.U)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_factors_are_computed_in_float32(make_family, dtype):
    # E7
    A, B, scale = make_family()[0]
    A, B = A.to(dtype), B.to(dtype)
    svd = thin_svd(A, B, scale)
    assert svd.S.dtype == torch.float32
    torch.testing.assert_close((svd.U * svd.S) @ svd.Vh, scale * B.float() @ A.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_factor_is_refused(make_family, bad):
    A, B, scale = make_family()[0]
    A[1, 2] = bad
    with pytest.raises(BankError, match="an update holds nan or inf"):
        thin_svd(A, B, scale)


def test_an_update_beyond_float32_is_refused_too():
    # finite factors, infinite update: its weight 1 / ||dW|| would be 0 and its error nan
    with pytest.raises(BankError, match="or overflows"):
        thin_svd(torch.full((1, 4), 1e30), torch.full((4, 1), 1e30))


def test_the_norm_needs_no_dense_update(make_family):
    A, B, scale = make_family()[0]
    assert update_norm(A, B, -scale) == pytest.approx(float((scale * B @ A).norm()), rel=1e-6)
    assert update_norm(A, 0 * B, scale) == 0


def test_balanced_factors_carry_the_update_with_equal_grams(make_family):
    A, B, scale = make_family()[0]
    A2, B2 = balanced(thin_svd(A, B, scale))
    torch.testing.assert_close(B2 @ A2, scale * B @ A, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(A2 @ A2.T, B2.T @ B2, rtol=1e-4, atol=1e-4)


def test_truncation_loses_exactly_the_discarded_energy(make_family):
    # Eckart-Young: no other update of that rank is nearer
    svd = thin_svd(*make_family(r=4)[0])
    lost = difference_norm(svd, *balanced(truncate(svd, 2)))
    assert lost == pytest.approx(float(svd.S[2:].norm()), rel=1e-4)
    assert truncate(svd, 99).S.shape == svd.S.shape


def test_the_error_is_that_of_the_dense_updates_down_to_rounding(make_family):
    A, B, scale = make_family()[0]
    svd, dW = thin_svd(A, B, scale), scale * B @ A
    off = A + 0.1
    dense = float((dW - scale * B @ off).norm() / dW.norm())
    assert relative_error(svd, off, scale * B) == pytest.approx(dense, rel=1e-4)
    assert relative_error(svd, *balanced(svd)) < 1e-6


def test_a_zero_update_has_no_error_until_something_is_put_in_its_place():
    zero = thin_svd(torch.zeros(2, 5), torch.zeros(4, 2))
    assert relative_error(zero, *balanced(zero)) == 0
    assert relative_error(zero, torch.ones(1, 5), torch.ones(4, 1)) == float("inf")
