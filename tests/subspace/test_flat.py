import pytest
import torch

from adapterbank.errors import BankError
from adapterbank.subspace.flat import align_ranks, basis_bytes, fit_flat, fit_flat_joint


@pytest.fixture
def stack():
    return torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(0))


def test_k_is_at_most_one_less_than_the_adapters(stack):
    # E45
    assert fit_flat(stack, 5).experts.shape == (5, 3, 8)
    with pytest.raises(BankError, match=r"k=6 is outside \[1, 5\]"):
        fit_flat(stack, 6)


def test_an_adapter_is_two_k_numbers_per_module():
    # E46: 144 modules of FLAN-T5-large at k = 8 are the paper's 2,304
    stack = torch.randn(9, 2, 5, generator=torch.Generator().manual_seed(0))
    assert 144 * 2 * fit_flat(stack, 8).project(stack[:1]).numel() == 2304


def test_the_basis_costs_r_times_a_row_basis(stack):
    # E47
    basis = fit_flat(stack, 4)
    assert basis_bytes(4, 3, 8) == basis.rows.components.numel() * 4 == 3 * (4 * 8 * 4)


def test_members_come_back_at_full_rank_and_least_squares_below(stack):
    # E48, analytic projection
    full, small = fit_flat(stack, 5), fit_flat(stack, 2)
    torch.testing.assert_close(full.reconstruct(full.project(stack)), stack, rtol=1e-4, atol=1e-4)
    lost = (stack - small.reconstruct(small.project(stack))).square().sum()
    torch.testing.assert_close(lost, small.rows.singular_values[2:].square().sum(), rtol=1e-4, atol=1e-4)


def test_random_coefficients_stay_in_the_subspace(stack):
    # E48, zero-shot: whatever the numbers, the factor projects back to them
    basis = fit_flat(stack, 3)
    coefficients = torch.rand(2, 3, generator=torch.Generator().manual_seed(1)) - 0.5
    torch.testing.assert_close(basis.project(basis.reconstruct(coefficients)), coefficients, rtol=0, atol=1e-5)


def test_the_output_is_a_dense_mixture_of_experts(stack):
    # E49: output equals sum_k a_k (expert k) per factor, plus the mean expert
    basis = fit_flat(stack, 3)
    coefficients = basis.project(stack)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    experts = torch.einsum("bd,krd->bkr", x, basis.experts)
    mixed = torch.einsum("k,bkr->br", coefficients[0], experts) + x @ basis.rows.mean.view(3, 8).T
    torch.testing.assert_close(x @ basis.reconstruct(coefficients)[0].T, mixed, rtol=1e-4, atol=1e-4)


def test_a_joint_basis_moves_both_factors_with_one_vector(stack):
    B_T = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(3))
    basis = fit_flat_joint(stack, B_T, 5)
    coefficients = basis.project(stack, B_T)
    A2, B2 = basis.reconstruct(coefficients)
    assert coefficients.shape == (6, 5)
    torch.testing.assert_close(A2, stack, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(B2, B_T, rtol=1e-4, atol=1e-4)


def test_other_ranks_need_consent():
    factors = [torch.ones(2, 4), torch.ones(3, 4)]
    with pytest.raises(BankError, match=r"one rank, not \[2, 3\]; set pad=True"):
        align_ranks(factors)
    padded = align_ranks(factors, pad=True)
    assert padded.shape == (2, 3, 4)
    assert padded[0, 2].count_nonzero() == 0


def test_another_shape_is_refused(stack):
    with pytest.raises(BankError, match=r"shape \(2, 8\) doesn't fit a flat basis of \(3, 8\)"):
        fit_flat(stack, 2).project(stack[:, :2])
