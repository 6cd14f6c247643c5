import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterbank.errors import BankError
from adapterbank.subspace.completion import complete, leading_directions, orthonormal, random_directions


def is_orthonormal(rows):
    return torch.allclose(rows @ rows.T, torch.eye(len(rows)), atol=1e-5)


def rows(m, d, seed=0):
    return torch.randn(m, d, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)
@given(m=st.integers(1, 6), d=st.integers(6, 20), k=st.integers(0, 5), seed=st.integers(0, 99))
def test_orthonormal_rows_keep_the_span_and_leave_the_other(m, d, k, seed):
    given_rows, against = rows(m, d, seed), orthonormal(rows(k, d, seed + 100))
    found = orthonormal(given_rows, against, dependent=1e-6)
    both = torch.cat([against, found])
    assert is_orthonormal(both)
    torch.testing.assert_close(given_rows @ both.T @ both, given_rows, rtol=1e-4, atol=1e-4)


def test_what_is_orthonormal_already_stays():
    unit = torch.linalg.qr(rows(9, 4).T.contiguous().T)[0].T.contiguous()
    torch.testing.assert_close(orthonormal(unit), unit)


def test_zero_rows_and_repeated_ones_are_left_out():
    one = rows(1, 5)
    assert len(orthonormal(torch.cat([one, torch.zeros(1, 5), 2 * one + 1e-4 * rows(1, 5, 7)]))) == 1


def test_random_directions_are_orthogonal_seeded_and_new():
    basis = orthonormal(rows(4, 12))
    found = random_directions(5, 12, basis, seed=3)
    assert is_orthonormal(torch.cat([basis, found]))
    assert torch.equal(found, random_directions(5, 12, basis, seed=3))
    assert not torch.allclose(found, random_directions(5, 12, basis, seed=4))
    assert is_orthonormal(torch.cat([basis, random_directions(5, 12, basis, seed=3, uniform=True)]))


def test_there_is_no_room_for_more_directions_than_features():
    basis = orthonormal(rows(4, 12))
    assert len(random_directions(8, 12, basis, seed=0)) == 8
    with pytest.raises(BankError, match="9 more directions don't fit beside 4 of 12"):
        random_directions(9, 12, basis, seed=0)


def test_augmenting_never_raises_the_error_of_a_projection():
    basis, x = orthonormal(rows(3, 10)), rows(6, 10, 5)
    more = torch.cat([basis, random_directions(2, 10, basis, seed=0)])
    assert (x - x @ more.T @ more).norm() <= (x - x @ basis.T @ basis).norm() + 1e-6


def test_leading_directions_are_those_of_the_residual():
    # Eckart-Young, in the complement of what is there
    basis, matrix = orthonormal(rows(2, 9)), rows(7, 9, 3)
    left = matrix - matrix @ basis.T @ basis
    found = leading_directions(matrix, 3, basis)
    assert is_orthonormal(torch.cat([basis, found]))
    lost = (left - left @ found.T @ found).square().sum()
    torch.testing.assert_close(lost, torch.linalg.svdvals(left)[3:].square().sum(), rtol=1e-4, atol=1e-4)


def test_a_matrix_inside_the_basis_has_no_more_directions():
    basis = orthonormal(rows(3, 8))
    assert len(leading_directions(rows(5, 3) @ basis, 4, basis)) == 0


def test_completing_takes_stored_rows_first_then_the_rest_by_weight():
    stored = orthonormal(rows(2, 10))
    strong, weak = 10 * rows(2, 10, 1), rows(3, 10, 2)
    found = complete(stored, [strong, weak], 4)
    torch.testing.assert_close(found[:2], stored)
    assert is_orthonormal(found)
    new = orthonormal(strong, stored)
    assert torch.linalg.svdvals(found[2:] @ new.T).min() > 0.95
    torch.testing.assert_close(complete(stored, [], 1), stored[:1])
    # a family of two rows has rank two, however coarsely its directions were stored
    assert len(complete(stored, [strong], 9)) == 2
    assert len(complete(stored[:1], [strong, weak], 9)) == 5
