import pytest
import torch

from adapterbank.errors import BankError
from adapterbank.subspace.baselines import quantized, rivals, truncated_svd
from adapterbank.subspace.updates import relative_error, thin_svd


@pytest.fixture
def factors():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 64, generator=generator), torch.randn(128, 4, generator=generator), 0.5


@pytest.mark.parametrize(("bits", "per_value"), [(8, 8.25), (4, 4.25)])
def test_groups_cost_a_quarter_of_a_bit_a_value(factors, bits, per_value):
    assert quantized(*factors, bits=bits).bytes == 4 * (64 + 128) * per_value / 8


def test_part_groups_and_odd_counts_round_up():
    assert quantized(torch.ones(1, 65), torch.ones(1, 1), bits=4).bytes == (33 + 2 * 2) + (1 + 2)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_are_within_half_a_step_of_their_group(factors, bits):
    A, B, scale = factors
    coded = quantized(A, B, scale, bits=bits)
    step = A.view(-1, 64).abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    # the scale is rounded to float16, which moves the levels by 2^-11 of themselves
    assert ((coded.A - A).abs() <= step / 2 + A.abs().max() * 2**-10).all()
    torch.testing.assert_close(coded.B, scale * quantized(B.T, B, bits=bits).A.T)


def test_rounding_again_changes_nothing(factors):
    once = quantized(*factors)
    again = quantized(once.A, once.B)
    torch.testing.assert_close(again.A, once.A, rtol=1e-3, atol=1e-4)


def test_zeros_and_huge_values_stay_finite():
    coded = quantized(torch.zeros(2, 8), torch.full((8, 2), 1e9), bits=4)
    assert coded.A.count_nonzero() == 0
    assert torch.isfinite(coded.B).all()


@pytest.mark.parametrize(("bits", "size"), [(32, 4), (16, 2)])
def test_a_truncated_svd_costs_its_vectors_and_loses_the_tail(factors, bits, size):
    svd = thin_svd(*factors)
    coded = truncated_svd(*factors, rank=2, bits=bits)
    assert coded.bytes == 2 * (64 + 128) * size
    error = relative_error(svd, coded.A, coded.B)
    assert error == pytest.approx(float(svd.S[2:].norm() / svd.S.norm()), rel=1e-3)


def test_a_rank_beyond_the_update_costs_no_more_than_its_own(factors):
    coded = truncated_svd(*factors, rank=9, bits=32)
    assert coded.bytes == 4 * 4 * (64 + 128)
    assert relative_error(thin_svd(*factors), coded.A, coded.B) < 1e-6


def test_more_bytes_never_hurt_within_a_kind(factors):
    svd = thin_svd(*factors)
    table = {name: rival(*factors) for name, rival in rivals(4).items()}
    errors = {name: relative_error(svd, coded.A, coded.B) for name, coded in table.items()}
    assert list(table) == [
        "int8", "int4",
        "svd1", "svd1+int8", "svd1+int4", "svd2", "svd2+int8", "svd2+int4", "svd4", "svd4+int8", "svd4+int4",
    ]  # fmt: skip
    for better, worse in (("int8", "int4"), ("svd2", "svd1"), ("svd4", "svd4+int8"), ("svd4+int8", "svd4+int4")):
        assert table[better].bytes > table[worse].bytes
        assert errors[better] < errors[worse]


def test_bad_settings_are_refused(factors):
    with pytest.raises(BankError, match="2 to 8 bits, not 1"):
        quantized(*factors, bits=1)
    with pytest.raises(BankError, match="rank >= 1, not 0"):
        truncated_svd(*factors, rank=0)
