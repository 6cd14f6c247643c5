import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterbank.codec.plain import BITS, PlainReader, PlainWriter, packed_bytes
from adapterbank.errors import BankError

SHAPES = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=5)


def matrices(shapes, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(*shape, generator=generator) for shape in shapes]


@settings(max_examples=60, deadline=None)
@given(
    shapes=SHAPES, bits=st.sampled_from(BITS), seed=st.integers(0, 99), scale=st.sampled_from([0.0, 1e-20, 1.0, 1e20])
)
def test_a_reader_gets_exactly_what_the_writer_returned(shapes, bits, seed, scale):
    writer = PlainWriter(bits)
    expected = [writer.matrix(m) for m in matrices(shapes, seed, scale)]
    payload = writer.finish()
    assert payload.nbytes == sum(packed_bytes(rows * cols, bits) for rows, cols in shapes)
    reader = PlainReader(payload, bits)
    for shape, wanted in zip(shapes, expected, strict=True):
        assert torch.equal(reader.matrix(*shape), wanted)


def test_32_bits_are_the_values_themselves():
    [matrix] = matrices([(7, 9)], 0)
    assert torch.equal(PlainWriter(32).matrix(matrix), matrix)


def test_what_is_returned_shares_no_memory_with_what_was_given():
    [matrix] = matrices([(2, 2)], 0)
    decoded = PlainWriter(32).matrix(matrix)
    matrix.zero_()
    assert decoded.any()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 99), scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]))
def test_16_bits_are_within_half_a_step_of_the_largest(seed, scale):
    [matrix] = matrices([(4, 6)], seed, scale)
    decoded = PlainWriter(16).matrix(matrix)
    assert (decoded - matrix).abs().max() <= 0.502 * matrix.abs().max() / (2**15 - 1)
    assert decoded.abs().max() == pytest.approx(float(matrix.abs().max()), rel=1e-6)


def test_other_widths_are_refused():
    with pytest.raises(BankError, match="16 or 32"):
        PlainWriter(8)


@pytest.mark.parametrize("bits", BITS)
def test_missing_bytes_are_an_error_and_no_allocation(bits):
    reader = PlainReader(np.zeros(10, dtype=np.uint8), bits)
    with pytest.raises(BankError, match="damaged"):
        reader.matrix(2**31, 2**31)
