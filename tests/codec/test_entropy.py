import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from adapterbank.codec.entropy import CLASS_LIMIT, INTEGER_REACH, LARGEST, Reader, Writer, split_class
from adapterbank.codec.tables import CLASS_TOP, CLASS_ZERO, CLASSES_PER_OCTAVE, quantiser
from adapterbank.errors import BankError

ANY_CLASS = st.integers(CLASS_ZERO - 3, CLASS_LIMIT)
ANY_VALUE = st.floats(-(2.0**100), 2.0**100, width=32)


@st.composite
def blocks(draw):
    p, d = draw(st.integers(0, 5)), draw(st.integers(0, 6))
    columns = draw(st.sampled_from([1, d]))
    steps = draw(npst.arrays(np.float32, (p, d), elements=st.one_of(st.floats(-20, 20, width=32), ANY_VALUE)))
    return steps, draw(npst.arrays(np.int64, (p, columns), elements=ANY_CLASS))


@settings(max_examples=150, deadline=None)
@given(parts=st.lists(st.one_of(blocks(), st.integers(-LARGEST, LARGEST)), max_size=6))
def test_a_reader_gets_exactly_what_the_writer_returned(parts):
    writer, expected = Writer(), []
    for part in parts:
        if isinstance(part, int):
            writer.integer(part)
            expected.append(part)
        else:
            expected.append(writer.values(*part))
    reader = Reader(writer.finish())
    for part, wanted in zip(parts, expected, strict=True):
        if isinstance(part, int):
            assert reader.integer() == wanted
        else:
            assert np.array_equal(reader.values(part[1], part[0].shape[1]), wanted)


@settings(max_examples=100, deadline=None)
@given(value=st.floats(-1e9, 1e9, width=32), class_=st.integers(CLASS_ZERO + 1, CLASS_LIMIT))
def test_a_value_comes_back_within_a_step_however_far_out_it_is(value, class_):
    # the dead zone of the narrowest class is the widest cell; beyond 2**24 float32 itself rounds
    [[decoded]] = Writer().values(np.array([[value]], dtype=np.float32), np.array([[class_]]))
    assert abs(decoded - value) <= max(1.3, 2e-7 * abs(value))


def test_what_lies_beyond_everything_is_cut_off_and_still_readable():
    classes = np.array([[0, CLASS_TOP, CLASS_LIMIT]])
    writer = Writer()
    decoded = writer.values(np.array([[1e38, -1e38, 1e38]], dtype=np.float32), classes)
    assert np.abs(decoded) == pytest.approx(LARGEST, rel=1e-6)
    assert np.array_equal(Reader(writer.finish()).values(classes, 3), decoded)


def test_the_zero_class_costs_nothing_and_decodes_to_zero():
    writer = Writer()
    assert not writer.values(np.full((3, 4), 5.0), np.full((3, 1), CLASS_ZERO)).any()
    assert writer.finish().nbytes <= Writer().finish().nbytes


def test_a_class_for_each_row_is_that_class_for_each_value():
    steps = np.random.default_rng(0).standard_normal((4, 30)) * 3
    rows = np.array([[2], [40], [CLASS_ZERO], [2]])
    one, each = Writer(), Writer()
    assert np.array_equal(one.values(steps, rows), each.values(steps, np.broadcast_to(rows, steps.shape).copy()))
    assert np.array_equal(one.finish(), each.finish())


@pytest.mark.parametrize("class_", [CLASS_ZERO + 1, -2, 0, 5, CLASS_TOP, CLASS_TOP + 1, CLASS_TOP + 18])
def test_the_stream_is_as_short_as_the_model_says(class_):
    sigma = 2 ** (class_ / CLASSES_PER_OCTAVE)
    steps = sigma * np.random.default_rng(0).standard_normal((40, 1000))
    writer = Writer()
    writer.values(steps, np.full((40, 1), class_))
    inner, plain = split_class(class_)
    bits = 8 * writer.finish().nbytes / steps.size
    assert bits == pytest.approx(quantiser(inner).rate + plain, rel=0.01, abs=0.01)


def test_small_integers_are_cheap_and_cheapest_at_zero():
    def bits(value):
        writer = Writer()
        for _ in range(2000):
            writer.integer(value)
        return 8 * writer.finish().nbytes / 2000

    costs = [bits(v) for v in (0, 1, 2, 5, INTEGER_REACH - 1)]
    assert costs == sorted(costs)
    assert costs[0] < 2.3
    assert bits(-2) == pytest.approx(bits(2), abs=0.05)
    # no integer is cheaper than this: the reader's bound on how many a payload can hold stands on it
    assert costs[0] > 2


def test_a_split_class_is_a_table_and_plain_bits_for_the_same_width():
    for class_ in range(CLASS_ZERO + 1, CLASS_LIMIT + 1):
        inner, plain = split_class(class_)
        assert inner + CLASSES_PER_OCTAVE * plain == class_
        assert CLASS_ZERO < inner <= CLASS_TOP
        assert plain <= 16


# --- payloads from strangers ----------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=60), class_=st.integers(-10, 10_000))
def test_random_bytes_give_values_or_a_bank_error(data, class_):
    with contextlib.suppress(BankError):
        reader = Reader(np.frombuffer(data, dtype=np.uint8))
        assert reader.values(np.array([[class_]]), 50).shape == (1, 50)
        assert abs(reader.integer()) <= 4 * LARGEST


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 10), flip=st.integers(0, 300), seed=st.integers(0, 9))
def test_a_damaged_stream_gives_wrong_values_or_a_bank_error(cut, flip, seed):
    classes = np.array([[3], [CLASS_TOP + 20], [0]])
    writer = Writer()
    writer.values(np.random.default_rng(seed).standard_normal((3, 60)) * 4, classes)
    words = writer.finish().view("<u4")
    damaged = words[: max(0, len(words) - cut)].copy().view(np.uint8)
    if damaged.size:
        damaged[flip % damaged.size] ^= 1 << flip % 8
    with contextlib.suppress(BankError):
        assert np.isfinite(Reader(damaged).values(classes, 60)).all()


def test_half_a_word_is_refused():
    with pytest.raises(BankError, match="not made of 32-bit words"):
        Reader(np.zeros(7, dtype=np.uint8))


def test_a_class_beyond_the_widest_is_refused():
    with pytest.raises(BankError, match="the widest is"):
        Reader(np.zeros(8, dtype=np.uint8)).values(np.array([[CLASS_LIMIT + 1]]), 3)


@pytest.mark.parametrize("fill", [0, 0x55, 0xFF])
def test_a_payload_does_not_hold_more_integers_than_its_bits_can(fill):
    # the coder reads on behind the end for ever
    reader = Reader(np.full(16, fill, dtype=np.uint8))
    with pytest.raises(BankError, match="damaged"):
        for _ in range(1000):
            reader.integer()
