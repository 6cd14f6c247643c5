import contextlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterbank.codec.entropy import CLASS_LIMIT, Reader, Writer
from adapterbank.codec.predictive import (
    FINEST,
    MOST_PROFILE,
    STEP_CODES,
    ModuleBasis,
    ModuleReader,
    ModuleWriter,
    SideBasis,
    coefficient_profile,
    decode_side_basis,
    encode_side_basis,
    step_code,
    step_of,
    to_class,
)
from adapterbank.codec.tables import CLASS_ZERO
from adapterbank.errors import BankError
from adapterbank.subspace.product import fit_product
from adapterbank.subspace.updates import relative_error, thin_svd, truncate


def weight_of(update):
    energy = float(update.S.double().square().sum())
    return 1 / energy if energy else 0.0


def basis_payload(basis, slope):
    writer = Writer()
    sides = []
    for rows, energy in ((basis.V, basis.eigenvalues_in), (basis.U.T, basis.eigenvalues_out)):
        weight = energy[: len(rows)].double().numpy()
        sides.append(encode_side_basis(writer, rows.contiguous(), weight, coefficient_profile(weight), slope))
    return writer.finish(), ModuleBasis(side_in=sides[0], side_out=sides[1])


@pytest.fixture
def shared(make_updates):
    """Updates of a planted family, and the decoded basis of its six directions."""
    updates = make_updates()
    return updates, basis_payload(fit_product(updates, 6, 6), 1e-5)[1]


def encode(update, basis, slope):
    writer = Writer()
    factors = ModuleWriter(writer).encode(update, basis, weight_of(update), slope)
    return writer.finish(), factors


# --- a reader sees what the writer saw --------------------------------------------------------------------------------


@pytest.mark.parametrize("slope", [1e-2, 1e-5, 1e-9])
def test_a_basis_is_read_as_the_writer_returned_it(make_updates, slope):
    updates = make_updates()
    payload, written = basis_payload(fit_product(updates, 7, 5), slope)
    reader = Reader(payload)
    for side, width in ((written.side_in, 96), (written.side_out, 80)):
        read = decode_side_basis(reader, width)
        assert torch.equal(read.vectors, side.vectors)
        assert np.array_equal(read.profile, side.profile)


@pytest.mark.parametrize("slope", [1e-1, 1e-3, 1e-6, 1e-12])
@pytest.mark.parametrize("with_basis", [True, False])
def test_members_are_read_as_the_writer_returned_them(shared, no_basis, slope, with_basis):
    updates, basis = shared
    basis = basis if with_basis else no_basis(96, 80)
    writer = Writer()
    coder = ModuleWriter(writer)
    written = [coder.encode(u, basis, weight_of(u), slope) for u in updates]
    reader = ModuleReader(Reader(writer.finish()))
    for A, B in written:
        read_A, read_B = reader.decode(basis, 4)
        assert torch.equal(read_A, A)
        assert torch.equal(read_B, B)


@settings(max_examples=40, deadline=None)
@given(
    r=st.integers(1, 9), d_in=st.integers(1, 12), d_out=st.integers(1, 12), k=st.integers(0, 3),
    size=st.sampled_from([1e-12, 1.0, 1e12]), slope=st.sampled_from([1e-1, 1e-4, 1e-15]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_and_size_is_read_as_written(r, d_in, d_out, k, size, slope, seed):
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(r, d_in, generator=generator), torch.randn(d_out, r, generator=generator)
    update = thin_svd(A, B, size)
    k = min(k, d_in, d_out, r)
    sides = [
        SideBasis(vectors=torch.linalg.qr(torch.randn(d, max(k, 1), generator=generator)).Q.T[:k],
                  profile=np.zeros(k, dtype=np.int64))
        for d in (d_in, d_out)
    ]  # fmt: skip
    basis = ModuleBasis(side_in=sides[0], side_out=sides[1])
    payload, (A, B) = encode(update, basis, slope)
    read_A, read_B = ModuleReader(Reader(payload)).decode(basis, r)
    assert torch.equal(read_A, A)
    assert torch.equal(read_B, B)
    assert relative_error(update, A, B) <= 1.001


# --- what is coded is what was meant ----------------------------------------------------------------------------------


def test_a_zero_update_costs_next_to_nothing_and_stays_zero(shared):
    _, basis = shared
    payload, (A, B) = encode(thin_svd(torch.zeros(4, 96), torch.zeros(80, 4)), basis, 1e-6)
    assert A.shape == (0, 96)
    assert B.shape == (80, 0)
    assert payload.nbytes <= 4


@pytest.mark.parametrize("with_basis", [True, False])
def test_it_is_exact_as_the_slope_goes_to_zero(shared, no_basis, with_basis):
    updates, basis = shared
    basis = basis if with_basis else no_basis(96, 80)
    for update in updates:
        _, factors = encode(update, basis, 2.0**-60)
        assert relative_error(update, *factors) < 2e-6


@pytest.mark.parametrize("with_basis", [True, False])
def test_the_error_falls_and_the_bytes_grow_with_a_smaller_slope(shared, no_basis, with_basis):
    updates, basis = shared
    basis = basis if with_basis else no_basis(96, 80)
    slopes = [10.0**-e for e in range(2, 9)]
    coded = [[encode(u, basis, slope) for u in updates] for slope in slopes]
    errors = [sum(relative_error(u, *f) ** 2 for u, (_, f) in zip(updates, c, strict=True)) for c in coded]
    sizes = [sum(payload.nbytes for payload, _ in c) for c in coded]
    assert errors == sorted(errors, reverse=True)
    assert sizes == sorted(sizes)


def test_a_basis_that_predicts_saves_bytes_at_the_same_slope_and_error(shared, no_basis):
    updates, basis = shared
    with_, without = ([encode(u, b, 1e-6) for u in updates] for b in (basis, no_basis(96, 80)))
    assert sum(p.nbytes for p, _ in with_) < 0.8 * sum(p.nbytes for p, _ in without)
    for update, (_, shared_factors), (_, alone) in zip(updates, with_, without, strict=True):
        assert relative_error(update, *shared_factors) < 1.1 * relative_error(update, *alone)


@pytest.mark.parametrize("slope", [1e-3, 1e-4, 1e-5])
def test_never_worse_than_truncation_at_equal_bytes(make_updates, no_basis, slope):
    # vectors of 16 bits a value, as many as the same bytes hold
    for update in make_updates(n=4, r=8, d_in=300, d_out=200, shared=0):
        payload, factors = encode(update, no_basis(300, 200), slope)
        r = payload.nbytes // (2 * (300 + 200))
        left = truncate(update, r)
        A, B = left.S[:, None] * left.Vh, left.U
        assert relative_error(update, *factors) <= relative_error(update, A, B) * 1.02


def test_pairs_that_are_not_worth_their_bytes_are_dropped(no_basis):
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(4, 60, generator=generator), torch.randn(50, 4, generator=generator)
    A[2:] *= 1e-3
    update = thin_svd(A, B)
    _, (A, B) = encode(update, no_basis(60, 50), 1e-4)
    assert A.shape[0] == B.shape[1] == 2


def test_the_result_does_not_depend_on_size(shared):
    updates, basis = shared
    payload, (A, B) = encode(updates[0], basis, 1e-5)
    large = type(updates[0])(U=updates[0].U, S=updates[0].S * 2**20, Vh=updates[0].Vh)
    scaled, (large_A, large_B) = encode(large, basis, 1e-5)
    # steps are on a grid of quarter octaves and 2**10 a side is on it; only the first step code is longer
    assert abs(scaled.nbytes - payload.nbytes) <= 8
    torch.testing.assert_close(large_A, 2**10 * A)
    torch.testing.assert_close(large_B, 2**10 * B)


def test_coefficients_are_least_squares_against_the_decoded_directions(make_updates):
    updates = make_updates()
    _, basis = basis_payload(fit_product(updates, 6, 6), 1e-2)  # coarse: far from orthonormal
    rows, V = updates[0].Vh, basis.side_in.vectors
    left = rows - basis.side_in.project(rows) @ V
    assert (left @ V.T).abs().max() < 1e-5


def test_heavier_directions_are_coded_finer():
    rows = torch.linalg.qr(torch.randn(200, 3, generator=torch.Generator().manual_seed(0))).Q.T
    decoded = encode_side_basis(
        Writer(), rows.contiguous(), np.array([10.0, 1.0, 0.1]), np.zeros(3, dtype=np.int64), 1e-4
    )
    errors = (decoded.vectors - rows).square().sum(dim=1)
    assert errors[0] < errors[1] < errors[2]


def test_a_direction_without_any_weight_is_still_coded():
    rows = torch.eye(3, 40)
    writer = Writer()
    decoded = encode_side_basis(writer, rows, np.zeros(3), np.zeros(3, dtype=np.int64), 1e-6)
    assert decoded.k == 3
    assert torch.equal(decode_side_basis(Reader(writer.finish()), 40).vectors, decoded.vectors)


# --- small parts ------------------------------------------------------------------------------------------------------


def test_step_codes_are_quarter_octaves():
    codes = np.arange(STEP_CODES[0], STEP_CODES[1] + 1)
    assert np.array_equal(step_code(step_of(codes)), codes)
    assert step_of(np.array([STEP_CODES[0], 0, 4])).tolist() == [2.0**60, 1.0, 0.5]


def test_widths_become_the_nearest_class_within_the_limits():
    assert to_class(np.array([0.0, 1e-9, 1.0, 2.0, 1e30])).tolist() == [CLASS_ZERO, CLASS_ZERO, 0, 4, CLASS_LIMIT]


def test_profiles_are_relative_to_the_mean():
    assert coefficient_profile(np.array([1.0, 1.0])).tolist() == [0, 0]
    # a quarter of the energy is half the width: one octave, four classes
    profile = coefficient_profile(np.array([4.0, 1.0]))
    assert profile[0] - profile[1] == 4
    assert coefficient_profile(np.array([1.0, 0.0])).min() == -MOST_PROFILE
    assert coefficient_profile(np.zeros(0)).shape == (0,)


# --- payloads from strangers ------------------------------------------------------------------------------------------


def stream(*integers):
    writer = Writer()
    for value in integers:
        writer.integer(value)
    return Reader(writer.finish())


@pytest.mark.parametrize("k", [-1, 97, 2**30])
def test_a_basis_of_more_directions_than_features_is_refused_before_it_is_read(k):
    with pytest.raises(BankError, match="directions of 96 features"):
        decode_side_basis(stream(k), 96)


@pytest.mark.parametrize("pairs", [-1, 5, 2**30])
def test_more_pairs_than_the_rank_are_refused_before_they_are_read(no_basis, pairs):
    with pytest.raises(BankError, match="pairs"):
        ModuleReader(stream(pairs)).decode(no_basis(96, 80), 4)


@pytest.mark.parametrize("integers", [(1, STEP_CODES[0] - 1), (1, STEP_CODES[1] + 1), (1, 0, CLASS_LIMIT + 1)])
def test_impossible_steps_and_classes_are_refused(no_basis, integers):
    with pytest.raises(BankError, match="outside"):
        ModuleReader(stream(*integers)).decode(no_basis(96, 80), 4)
    with pytest.raises(BankError, match="outside"):
        decode_side_basis(stream(*integers), 96)


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=80))
def test_random_bytes_are_factors_or_a_bank_error(data):
    none = np.zeros(0, dtype=np.int64)
    sides = (SideBasis(vectors=torch.zeros(0, d), profile=none) for d in (30, 20))
    basis = ModuleBasis(side_in=next(sides), side_out=next(sides))
    data = data[: len(data) // 4 * 4]
    with contextlib.suppress(BankError):
        assert decode_side_basis(Reader(np.frombuffer(data, dtype=np.uint8)), 30).k <= 30
    with contextlib.suppress(BankError):
        A, B = ModuleReader(Reader(np.frombuffer(data, dtype=np.uint8))).decode(basis, 8)
        assert A.shape[0] == B.shape[1] <= 8


def test_no_step_is_finer_than_float32_can_tell(no_basis):
    [update] = [thin_svd(torch.eye(1, 64), torch.eye(48, 1))]
    fine, finer = (encode(update, no_basis(64, 48), slope)[0].nbytes for slope in (1e-30, 1e-60))
    assert fine == finer
    assert FINEST == 2.0**-20
