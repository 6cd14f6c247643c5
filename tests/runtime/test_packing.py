"""Packed matrices are as near as their bits say, alone, joined and stacked."""

import pytest
import torch

from adapterbank.errors import BankError
from adapterbank.runtime.packing import Packed


def drawn(seed=0):
    return torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-6, 6, 5)[:, None]


@pytest.mark.parametrize("bits", [8, 16])
def test_a_value_is_off_by_half_a_step_of_its_row(bits):
    matrix = drawn()
    packed = Packed.of(matrix, bits)
    step = matrix.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert ((packed.unpacked() - matrix).abs() <= 0.501 * step).all()
    assert packed.bytes == 5 * 7 * bits // 8 + 5 * 4


def test_32_bits_and_zeros_come_back_as_they_were():
    matrix = drawn()
    assert torch.equal(Packed.of(matrix, 32).unpacked(), matrix) and Packed.of(matrix, 32).bytes == matrix.nbytes
    for bits in (8, 16, 32):
        assert torch.equal(Packed.of(torch.zeros(3, 4), bits).unpacked(), torch.zeros(3, 4))
        assert Packed.of(torch.zeros(0, 4), bits).unpacked().shape == (0, 4)
    with pytest.raises(BankError, match="tables have 8, 16 or 32 bits a value, not 4"):
        Packed.of(matrix, 4)


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_a_stack_is_its_matrices(bits):
    several = [Packed.of(drawn(seed), bits) for seed in range(3)]
    stacked = Packed.stacked(several).unpacked()
    assert all(torch.equal(stacked[i], packed.unpacked()) for i, packed in enumerate(several))
    joined = Packed.joined(several)
    assert torch.equal(joined.codes.view(3, 5, 7), Packed.stacked(several).codes)
    assert joined.bytes == sum(packed.bytes for packed in several)


def test_a_type_of_16_bits_rounds_once():
    packed = Packed.of(drawn(), 16)
    assert torch.equal(packed.unpacked(torch.bfloat16), packed.unpacked().to(torch.bfloat16))
