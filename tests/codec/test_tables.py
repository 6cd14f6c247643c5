import hashlib
import math

import numpy as np
import pytest

from adapterbank.codec.tables import (
    CLASS_TOP,
    CLASS_ZERO,
    CLASSES_PER_OCTAVE,
    FREQUENCY_BITS,
    SLOPE,
    quantiser,
    rate_distortion_curve,
)

CLASSES = range(CLASS_ZERO + 1, CLASS_TOP + 1)
every_class = pytest.mark.parametrize("class_", CLASSES)


def sigma(class_):
    return 2 ** (class_ / CLASSES_PER_OCTAVE)


def shannon(distortion):
    return 0.5 * math.log2(1 / distortion)


def test_the_tables_are_those_of_format_1():
    # a reader builds these integers itself: where erfc or exp differ enough to show, its banks would be unreadable
    digest = hashlib.sha256(b"".join(quantiser(c).frequencies.astype("<i8").tobytes() for c in CLASSES))
    assert digest.hexdigest() == "0dfafd9f6b5d94674118c4b7348362e36266232b9bc58b01e55a14509f285bfb"


@every_class
def test_frequencies_are_symmetric_and_none_is_zero(class_):
    table = quantiser(class_)
    assert len(table.frequencies) == 2 * table.top + 1
    assert np.array_equal(table.frequencies, table.frequencies[::-1])
    assert table.frequencies.min() >= 1
    # rounding up of the rare ones adds little
    assert table.frequencies.sum() == pytest.approx(2**FREQUENCY_BITS, rel=1e-3)


@every_class
def test_cells_are_in_order_and_hold_their_levels(class_):
    table = quantiser(class_)
    edges = np.concatenate([[0.0], table.thresholds, [np.inf]])
    assert table.levels[0] == 0
    assert (np.diff(edges) > 0).all()
    assert (edges[:-1] <= table.levels).all()
    assert (table.levels <= edges[1:]).all()


@every_class
def test_levels_are_the_centroids_of_their_cells(class_):
    table, width = quantiser(class_), sigma(class_)
    edges = np.concatenate([[0.0], table.thresholds, [12 * width]])
    for m in range(1, min(table.top, math.ceil(4 * width)) + 1):
        inside = np.linspace(edges[m], edges[m + 1], 20001)
        density = np.exp(-0.5 * (inside / width) ** 2)
        assert table.levels[m] == pytest.approx((inside * density).sum() / density.sum(), rel=2e-3)


@every_class
def test_rate_and_distortion_are_what_sampled_gaussians_get(class_):
    table, values = quantiser(class_), sigma(class_) * np.random.default_rng(0).standard_normal(400_000)
    cells = np.searchsorted(table.thresholds, np.abs(values), side="right")
    decoded = np.sign(values) * table.levels[cells]
    share = table.frequencies / table.frequencies.sum()
    bits = -np.log2(share[table.top + np.where(values < 0, -cells, cells)]).mean()
    assert np.square(values - decoded).mean() / sigma(class_) ** 2 == pytest.approx(table.distortion, rel=0.015)
    # the model's tails are heavier than these samples', which makes them a little dearer than they are
    assert bits == pytest.approx(table.rate, abs=0.01)


@every_class
def test_within_a_quarter_bit_of_shannon(class_):
    # 0.2546 bits is the uniform quantiser's high-rate gap; the heavier tails cost about 0.01
    table = quantiser(class_)
    assert 0 < table.rate - shannon(table.distortion) < 0.27


def test_wider_classes_cost_more_bits_and_lose_less():
    tables = [quantiser(c) for c in CLASSES]
    assert (np.diff([t.rate for t in tables]) > 0).all()
    assert (np.diff([t.distortion for t in tables]) < 0).all()


@pytest.mark.parametrize("class_", range(0, CLASS_TOP))
def test_the_next_class_buys_error_at_the_one_slope(class_):
    # so one multiplier may set every step: -dD/dR at a fixed variance is the same at every rate, in squared steps
    here, finer = quantiser(class_), quantiser(class_ + 1)
    # the same values at a finer step: distortions are shares of the same variance
    bought = (here.distortion - finer.distortion) / (finer.rate - here.rate) * sigma(class_ + 0.5) ** 2
    assert bought == pytest.approx(SLOPE, rel=0.05)


@pytest.mark.parametrize("class_", [CLASS_ZERO, CLASS_TOP + 1])
def test_classes_outside_have_no_table(class_):
    with pytest.raises(ValueError, match="outside"):
        quantiser(class_)


def test_the_curve_joins_the_classes():
    log_ratio, rate, distortion = rate_distortion_curve()
    assert np.array_equal(log_ratio, np.array(CLASSES) * 2 / CLASSES_PER_OCTAVE)
    assert rate.tolist() == [quantiser(c).rate for c in CLASSES]
    assert distortion.tolist() == [quantiser(c).distortion for c in CLASSES]
    # at high rates a bit buys a quarter of the error
    assert rate[-1] - rate[-1 - CLASSES_PER_OCTAVE] == pytest.approx(1, abs=0.01)
    assert distortion[-1] / distortion[-1 - CLASSES_PER_OCTAVE] == pytest.approx(0.25, rel=0.01)
