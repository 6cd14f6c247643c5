"""Each op is its row-by-row formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterbank.runtime import ops

sizes = st.integers(1, 5)


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(m=sizes, t=sizes, r=sizes, k_in=sizes, k_out=sizes, d_in=sizes, d_out=sizes)
def test_a_row_goes_through_its_own_coefficients(m, t, r, k_in, k_out, d_in, d_out):
    x, V, U = drawn(m, t, d_in), drawn(k_in, d_in), drawn(d_out, k_out)
    coef_A, coef_B, private_A, private_B = drawn(m, r, k_in), drawn(m, k_out, r), drawn(m, r, d_in), drawn(m, d_out, r)
    A, B = ops.built(V, U, coef_A, coef_B)
    found = {
        "basis": ops.through_basis(x, V, U, coef_A, coef_B),
        "factors": ops.through_factors(x, A, B),
        "both": ops.through_both(x, V, U, coef_A, coef_B, private_A, private_B),
    }
    for i in range(m):
        shared = (U @ coef_B[i]) @ (coef_A[i] @ V)
        whole = (U @ coef_B[i] + private_B[i]) @ (coef_A[i] @ V + private_A[i])
        for name, update in (("basis", shared), ("factors", shared), ("both", whole)):
            torch.testing.assert_close(found[name][i], x[i] @ update.T)


@pytest.mark.parametrize(("k", "r"), [(64, 16), (33, 32), (32, 32), (8, 16)])
def test_from_the_crossover_on_built_factors_take_fewer_products(k, r):
    d, most = 1000, ops.crossover(k, r)
    for tokens in (1, 10, 100, 2000):
        through = tokens * k * 2 * d
        building = k * r * 2 * d + tokens * r * 2 * d
        assert (building <= through) == (tokens >= most)
