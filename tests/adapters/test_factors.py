import pytest
import torch

from adapterbank.adapters import LoraFactors
from adapterbank.errors import AdapterError


def test_update_is_scale_times_B_times_A():
    A, B = torch.randn(2, 5), torch.randn(3, 2)
    factors = LoraFactors(A=A, B=B, scale=0.5)
    assert (factors.rank, factors.d_in, factors.d_out) == (2, 5, 3)
    torch.testing.assert_close(factors.update(), 0.5 * B @ A)


def test_update_is_float32_whatever_the_factors_are():
    factors = LoraFactors(A=torch.ones(1, 2, dtype=torch.bfloat16), B=torch.ones(2, 1, dtype=torch.bfloat16), scale=1.0)
    assert factors.update().dtype == torch.float32


def test_a_scale_that_is_not_finite_is_refused():
    with pytest.raises(AdapterError, match="the scale of an update is nan"):
        LoraFactors(A=torch.ones(1, 1), B=torch.ones(1, 1), scale=float("nan"))


def test_factors_of_different_rank_are_refused_with_both_shapes():
    with pytest.raises(AdapterError, match=r"A is \(2, 5\) and B is \(3, 4\)"):
        LoraFactors(A=torch.ones(2, 5), B=torch.ones(3, 4), scale=1.0)
