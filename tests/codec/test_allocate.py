import math
from itertools import pairwise

import numpy as np
import pytest

from adapterbank.codec.allocate import allocate, basis_sizes
from adapterbank.codec.entropy import Reader, Writer
from adapterbank.codec.predictive import (
    ModuleBasis,
    ModuleWriter,
    coefficient_profile,
    decode_side_basis,
    encode_side_basis,
)
from adapterbank.subspace.product import fit_product
from adapterbank.subspace.updates import difference_norm


def fp32_bits(updates):
    return 32 * sum(u.S.numel() * (u.U.shape[0] + u.Vh.shape[1]) for u in updates)


def coded(updates, found):
    """Bits and root mean square error of really coding ``updates`` at an allocation."""
    (k_in, k_out), passed = found.sizes[0], found.passed_on[0]
    basis = fit_product(updates, max(k_in, 1), max(k_out, 1))
    writer = Writer()
    sides = []
    for rows, energy, k, share in (
        (basis.V, basis.eigenvalues_in, k_in, passed[0]),
        (basis.U.T, basis.eigenvalues_out, k_out, passed[1]),
    ):
        weight = energy[:k].double().numpy()
        profile = coefficient_profile(weight)
        sides.append(encode_side_basis(writer, rows[:k], share * weight, profile, found.slope))
    module = ModuleBasis(side_in=sides[0], side_out=sides[1])
    reader = Reader(writer.finish())
    assert decode_side_basis(reader, basis.V.shape[1]).k == k_in
    bits, lost = 8 * writer.finish().nbytes, 0.0
    # one stream for all, as for the modules of one adapter: the first vector's metadata is dear
    writer = Writer()
    coder = ModuleWriter(writer)
    for update in updates:
        weight = 1 / float(update.S.double().square().sum())
        lost += weight * difference_norm(update, *coder.encode(update, module, weight, found.slope)) ** 2
    bits += 8 * writer.finish().nbytes
    return bits, math.sqrt(lost / len(updates))


def test_sizes_double_and_half_double_up_to_the_limit():
    assert basis_sizes(0) == [0]
    assert basis_sizes(1) == [0, 1]
    assert basis_sizes(10) == [0, 1, 2, 3, 4, 6, 8, 10]
    assert basis_sizes(16) == [0, 1, 2, 3, 4, 6, 8, 12, 16]


@pytest.mark.parametrize("ratio", [6, 12, 20])
def test_planted_families_take_the_bits_and_the_error_that_the_model_expects(make_updates, statistics_of, ratio):
    updates = make_updates(n=24, d_in=200, d_out=160)
    found = allocate([statistics_of(updates)], adapters=24, bits=fp32_bits(updates) / ratio)
    bits, error = coded(updates, found)
    # metadata, which the model takes as a constant, weighs most where there are few bits
    assert bits == pytest.approx(found.bits, rel=0.05 if ratio < 20 else 0.08)
    assert error == pytest.approx(found.error, rel=0.05)


@pytest.mark.parametrize("error", [0.03, 0.1, 0.3])
def test_an_error_asked_for_is_the_error_expected(make_updates, statistics_of, error):
    found = allocate([statistics_of(make_updates())], adapters=12, error=error)
    assert found.error == pytest.approx(error, rel=0.01)


def test_bits_asked_for_are_the_bits_expected(make_updates, statistics_of):
    updates = make_updates()
    found = allocate([statistics_of(updates)], adapters=12, bits=fp32_bits(updates) / 10)
    assert found.bits == pytest.approx(fp32_bits(updates) / 10, rel=0.01)


@pytest.mark.parametrize("shared", [0, 6])
def test_more_bits_are_a_smaller_slope_and_never_more_error(make_updates, statistics_of, shared):
    updates = make_updates(shared=shared)
    statistics, bits = statistics_of(updates), fp32_bits(updates)
    found = [allocate([statistics], adapters=12, bits=bits / ratio) for ratio in (40, 28, 20, 14, 10, 7, 5, 3)]
    assert all(a.slope > b.slope for a, b in pairwise(found))
    assert all(a.error >= b.error for a, b in pairwise(found))


def test_unrelated_adapters_get_no_basis(make_updates, statistics_of):
    updates = make_updates(n=16, shared=0)
    for ratio in (4, 8, 16):
        assert allocate([statistics_of(updates)], adapters=16, bits=fp32_bits(updates) / ratio).sizes == ((0, 0),)


def test_planted_adapters_share_the_planted_directions(make_updates, statistics_of):
    updates = make_updates(n=24, shared=6)
    for ratio in (6, 12):
        assert allocate([statistics_of(updates)], adapters=24, bits=fp32_bits(updates) / ratio).sizes == ((6, 6),)


def test_each_module_decides_for_itself(make_updates, statistics_of):
    related, unrelated = make_updates(n=24, shared=4), make_updates(n=24, shared=0, seed=1)
    found = allocate(
        [statistics_of(related), statistics_of(unrelated)], adapters=24, bits=fp32_bits(related + unrelated) / 8
    )
    assert found.sizes == ((4, 4), (0, 0))


def test_a_basis_is_worth_more_to_more_adapters(make_updates, statistics_of):
    # the same statistics, said to stand for more adapters: what is paid once may cost more
    statistics = statistics_of(make_updates(n=12, noise=1.0))
    k = [sum(allocate([statistics], adapters=n, sampled=12, error=0.2).sizes[0]) for n in (2, 12, 200, 5000)]
    assert k == sorted(k)
    assert k[0] < k[-1]


def test_given_sizes_are_kept(make_updates, statistics_of):
    statistics = statistics_of(make_updates())
    assert allocate([statistics], adapters=12, error=0.1, sizes=((3, 8),)).sizes == ((3, 8),)
    # 24 is all there are
    assert allocate([statistics], adapters=12, error=0.1, fixed_k=24).sizes == ((24, 24),)


def test_the_chosen_sizes_are_no_worse_than_others(make_updates, statistics_of):
    updates = make_updates(n=24)
    statistics, bits = statistics_of(updates), fp32_bits(updates) / 10
    chosen = allocate([statistics], adapters=24, bits=bits)
    for k in (0, 2, 4, 8, 16):
        assert chosen.error <= 1.01 * allocate([statistics], adapters=24, bits=bits, sizes=((k, k),)).error


def test_what_reaches_the_updates_is_a_share(make_updates, statistics_of):
    found = allocate([statistics_of(make_updates())], adapters=12, error=0.05)
    assert np.all((np.array(found.passed_on) > 0) & (np.array(found.passed_on) <= 1))


def test_one_target_is_asked_for(make_updates, statistics_of):
    for targets in ({}, {"bits": 1e4, "error": 0.1}):
        with pytest.raises(ValueError, match="give bits or error"):
            allocate([statistics_of(make_updates(n=2))], adapters=2, **targets)
