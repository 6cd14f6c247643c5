import numpy as np
import pytest

from adapterbank.codec.cost import PAIR_OVERHEAD, SideEnergy, basis_cost, gaussian_cost, pair_cost
from adapterbank.codec.entropy import Reader, Writer
from adapterbank.codec.predictive import ModuleWriter
from adapterbank.codec.tables import CLASS_TOP, CLASS_ZERO, CLASSES_PER_OCTAVE, SLOPE, quantiser
from adapterbank.subspace.updates import difference_norm


def make_side(energy, size):
    return SideEnergy(energy=energy, size=np.broadcast_to(size, energy.shape))


@pytest.mark.parametrize("class_", [CLASS_ZERO + 1, -2, 0, 7, CLASS_TOP])
def test_a_class_costs_what_its_table_says(class_):
    # weight 1 and slope SLOPE make the step 1
    variance = np.array([4.0 ** (class_ / CLASSES_PER_OCTAVE)])
    rate, lost = gaussian_cost(variance, np.ones(1), SLOPE)
    assert rate == pytest.approx(quantiser(class_).rate, abs=0.02)
    assert lost == pytest.approx(quantiser(class_).distortion, rel=0.03)


def test_only_variance_times_weight_over_slope_counts():
    variance = np.geomspace(1e-3, 1e6, 50)
    one = gaussian_cost(variance, np.full(50, 3.0), 0.1)
    for other in (gaussian_cost(3 * variance, np.ones(50), 0.1), gaussian_cost(variance, np.ones(50), 0.1 / 3)):
        assert np.allclose(one, other)


def test_finer_costs_more_and_loses_less_without_end():
    rate, lost = gaussian_cost(np.geomspace(1e-3, 1e15, 400), np.ones(400), SLOPE)
    assert (np.diff(rate) >= 0).all()
    assert (np.diff(lost) <= 0).all()
    assert (rate[0], lost[0]) == (0, 1)
    assert lost[-1] < 1e-14


@pytest.mark.parametrize("slope", [1e-3, 1e-5, 1e-7])
def test_a_side_of_one_part_is_that_many_gaussians(slope):
    side = make_side(np.ones((2, 1)), np.array([64.0]))
    bits, error, remainder = side.cost(np.array([1.0, 0.3]), slope)
    rate, lost = gaussian_cost(np.full(2, 1 / 64), np.array([1.0, 0.3]), slope)
    assert np.allclose(bits, 64 * rate)
    assert np.allclose(error, lost)
    assert np.allclose(remainder, lost)


def test_a_split_that_explains_is_cheaper_than_none():
    # 4 directions hold nearly everything: the remainder of 60 is then not worth coding
    weight, size = np.ones(1), np.array([4.0, 60.0])
    predicted = make_side(np.array([[0.999, 0.001]]), size).cost(weight, 1e-4)
    alike = make_side(np.array([[4 / 64, 60 / 64]]), size).cost(weight, 1e-4)
    assert predicted[0] < alike[0] / 4


def test_dropped_pairs_cost_no_bits_and_their_whole_weight():
    side = make_side(np.ones((3, 1)), np.array([32.0]))
    weight = np.array([1.0, 1e-3, 0.0])
    cost = pair_cost(weight, side, side, 1e-3)
    assert cost.keep.tolist() == [True, False, False]
    assert cost.bits[1:].tolist() == [0, 0]
    assert cost.error[1:].tolist() == [1e-3, 0]
    assert cost.bits[0] > PAIR_OVERHEAD


@pytest.mark.parametrize("slope", [1e-2, 1e-4, 1e-6])
def test_keeping_a_pair_is_never_dearer_than_dropping_it(slope):
    side = make_side(np.ones((40, 1)), np.array([50.0]))
    weight = np.geomspace(1e-6, 1, 40)
    cost = pair_cost(weight, side, side, slope)
    assert (cost.error + slope * cost.bits <= weight * (1 + 1e-12)).all()


def test_a_pairs_error_is_that_of_the_product_of_its_sides():
    rng = np.random.default_rng(0)
    wide = make_side(rng.dirichlet(np.ones(3), 5), np.array([2.0, 8.0, 90.0]))
    narrow = make_side(np.ones((5, 1)), np.array([20.0]))
    cost = pair_cost(np.ones(5), wide, narrow, 1e-4)
    error_in, error_out = cost.side_error
    assert np.allclose(cost.error, 1 - (1 - error_in) * (1 - error_out))
    assert np.allclose(cost.bits, sum(cost.side_bits) + PAIR_OVERHEAD)


def test_a_basis_direction_is_a_unit_vector_of_equal_values():
    bits, error = basis_cost(np.array([2.0]), np.array([100.0]), 1e-4)
    rate, lost = gaussian_cost(np.array([0.01]), np.array([2.0]), 1e-4)
    assert (bits, error) == (100 * rate, 2 * lost)


@pytest.mark.parametrize("slope", [1e-4, 1e-6, 1e-8])
def test_unshared_updates_take_the_bits_and_the_error_that_the_model_expects(make_updates, no_basis, slope):
    updates = make_updates(n=6, r=4, d_in=400, d_out=300, shared=0)
    expected_bits = expected_error = taken_error = 0.0
    writer = Writer()
    coder = ModuleWriter(writer)
    for update in updates:
        S = update.S.double().numpy()
        weight = float(1 / (S**2).sum())
        sides = [make_side(np.ones((4, 1)), np.array([float(d)])) for d in (400, 300)]
        cost = pair_cost(weight * S**2, *sides, slope)
        expected_bits += cost.bits.sum()
        expected_error += cost.error.sum()
        taken_error += weight * difference_norm(update, *coder.encode(update, no_basis(400, 300), weight, slope)) ** 2
    payload = writer.finish()
    assert 8 * payload.nbytes == pytest.approx(expected_bits, rel=0.05)
    # the second side mends part of the first one's error, so the model is on the safe side
    assert 0.8 * expected_error < taken_error < 1.05 * expected_error
    assert Reader(payload).integer() == 4
