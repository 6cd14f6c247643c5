import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterbank.errors import AdapterBankError
from adapterbank.shira import masks

SHAPES = [(40, 30), (30, 40), (64, 64), (7, 200)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def drawn(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mask_of(kind, shape, density, **options):
    """A mask of any kind."""
    weight, gradient = drawn(shape), drawn(shape, 1)
    return {
        "struct": lambda: masks.struct(shape, density, **options),
        "rand": lambda: masks.rand(shape, density, **options),
        "wm": lambda: masks.wm(weight, density, **options),
        "grad": lambda: masks.grad(gradient, density, **options),
        "snip": lambda: masks.snip(weight, gradient, density, **options),
    }[kind]()


# --- of every kind ----------------------------------------------------------------------------------------------------


@shapes
@pytest.mark.parametrize("kind", masks.KINDS)
@pytest.mark.parametrize("density", [0.01, 0.1, 1.0])
def test_positions_ascend_without_repetition_within_the_layer(kind, shape, density):
    found = mask_of(kind, shape, density)
    assert found.dtype == torch.int32
    assert (found.diff() > 0).all()
    assert int(found[0]) >= 0 and int(found[-1]) < shape[0] * shape[1]
    assert torch.equal(found, mask_of(kind, shape, density))


@shapes
@pytest.mark.parametrize("kind", ["rand", "wm", "grad", "snip"])
@pytest.mark.parametrize("density", [1e-6, 0.01, 0.33, 1.0])
def test_the_count_is_exact(kind, shape, density):
    assert len(mask_of(kind, shape, density)) == max(1, round(density * shape[0] * shape[1]))


@pytest.mark.parametrize("density", [0.0, -1.0, 1.1, math.nan])
def test_a_density_that_is_no_share_is_refused(density):
    with pytest.raises(AdapterBankError, match="is no share of a layer's weights"):
        masks.count_of((4, 4), density)


def test_large_layers_take_wide_positions():
    assert masks.rand((2**16, 2**16), 1e-8).dtype == torch.int64


@pytest.mark.parametrize(("kind", "options"), [("wm", {"part": 1}), ("struct", {"offset": 2}), ("rand", {"seed": 3})])
def test_a_mask_by_its_kind_is_that_of_its_function(kind, options):
    weight = drawn((40, 30))
    assert torch.equal(masks.choose(kind, weight, 0.1), mask_of(kind, (40, 30), 0.1))
    assert torch.equal(masks.choose(kind, weight, 0.1, **options), mask_of(kind, (40, 30), 0.1, **options))
    (option,) = options
    for other in {"wm", "struct", "rand"} - {kind}:
        with pytest.raises(AdapterBankError, match=f"{option}=.: {other} has none, {kind} has; leave it out"):
            masks.choose(other, weight, 0.1, **options)


def test_masks_of_a_gradient_or_of_no_kind_are_not_chosen_by_a_weight():
    with pytest.raises(AdapterBankError, match="'snip' follows the task's gradient"):
        masks.choose("snip", drawn((4, 4)), 0.1)
    with pytest.raises(AdapterBankError, match="'best' is unknown; choose from struct, rand"):
        masks.choose("best", drawn((4, 4)), 0.1)


# --- struct -----------------------------------------------------------------------------------------------------------


@shapes
def test_struct_is_every_so_many_rows_and_the_diagonal(shape):
    density, offset = 0.2, 2
    stride = masks.stride_of(shape, density)
    expected = torch.zeros(shape, dtype=torch.bool)
    expected[offset::stride] = True
    expected.fill_diagonal_(True)
    assert torch.equal(masks.struct(shape, density, offset=offset).long(), expected.flatten().nonzero()[:, 0])


@pytest.mark.parametrize("shape", [(512, 512), (512, 2048), (2048, 512)], ids=str)
@pytest.mark.parametrize("density", [0.01, 0.02, 0.1])
def test_struct_comes_close_to_the_density(shape, density):
    assert len(masks.struct(shape, density)) == pytest.approx(masks.count_of(shape, density), rel=0.25)


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.floats(0.001, 1.0))
def test_struct_is_within_a_row_of_the_density_and_no_less_than_a_row_and_the_diagonal(rows, columns, density):
    shape, wanted = (rows, columns), masks.count_of((rows, columns), density)
    for offset in {0, masks.stride_of(shape, density) - 1}:
        count = len(masks.struct(shape, density, offset=offset))
        assert abs(count - max(wanted, columns + min(shape) - 1)) <= columns


@pytest.mark.parametrize("density", [0.1, 0.3, 0.45])
def test_struct_masks_of_other_offsets_share_the_diagonal_only(density):
    shape = (60, 50)
    stride = masks.stride_of(shape, density)
    found = [set(masks.struct(shape, density, offset=o).tolist()) for o in range(stride)]
    diagonal = {i * 51 for i in range(50)}
    assert stride > 1
    for i, one in enumerate(found):
        for other in found[:i]:
            assert one & other == diagonal
    with pytest.raises(AdapterBankError, match=rf"offset={stride} is outside \[0, {stride}\)"):
        masks.struct(shape, density, offset=stride)


# --- rand -------------------------------------------------------------------------------------------------------------


def test_rand_differs_by_seed_and_by_layer():
    found = [masks.rand((50, 50), 0.1, seed=s, name=n) for s in (0, 1) for n in ("q", "v")]
    assert len({tuple(mask.tolist()) for mask in found}) == 4


def test_bernoulli_draws_have_the_binomial_count():
    total, density = 200 * 200, 0.05
    deviation = math.sqrt(total * density * (1 - density))
    counts = [len(masks.rand((200, 200), density, seed=s, bernoulli=True)) for s in range(20)]
    assert all(abs(count - total * density) < 5 * deviation for count in counts)
    assert len(set(counts)) > 1


@pytest.mark.parametrize("density", [0.0, 1.5, math.nan])
def test_draws_want_a_density_that_is_a_share(density):
    with pytest.raises(AdapterBankError, match="is no share of a layer's weights"):
        masks.rand((4, 4), density, bernoulli=True)


def test_a_negative_seed_is_refused():
    with pytest.raises(AdapterBankError, match="seed=-1 is negative; give 0 or more"):
        masks.rand((4, 4), 0.5, seed=-1)


def test_every_position_is_drawn_equally_often():
    hits = torch.zeros(400)
    for seed in range(400):
        hits[masks.rand((20, 20), 0.1, seed=seed).long()] += 1
    assert (hits - 40).abs().max() < 5 * math.sqrt(400 * 0.1 * 0.9)


# --- by size ----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 4))
def test_wm_is_what_a_stable_sort_says(seed, count, values):
    # few distinct values, so that there are ties
    weight = torch.randint(-values, values + 1, (8, 10), generator=torch.Generator().manual_seed(seed)).float()
    order = weight.abs().flatten().sort(descending=True, stable=True).indices
    density = count / 80
    assert masks.wm(weight, density).tolist() == order[:count].sort().values.tolist()
    if 2 * count <= 80:
        assert masks.wm(weight, density, part=1).tolist() == order[count : 2 * count].sort().values.tolist()


def test_parts_are_disjoint_and_together_the_largest():
    weight = drawn((30, 30))
    assert masks.parts_of((30, 30), 0.1) == 10
    parts = [set(masks.wm(weight, 0.1, part=j).tolist()) for j in range(10)]
    for upto in range(1, 11):
        assert set().union(*parts[:upto]) == set(masks.wm(weight, 0.1 * upto).tolist())
    assert sum(map(len, parts)) == 900
    with pytest.raises(AdapterBankError, match="part=10: a layer of 900 weights has no 11 parts of 90"):
        masks.wm(weight, 0.1, part=10)


def test_snip_stays_where_weights_grow_and_gradients_shrink_and_wm_does_not():
    weight, gradient = drawn((30, 30)), drawn((30, 30), 1)
    scale = 2.0 ** (torch.arange(30)[:, None] % 7)  # powers of two: no rounding
    assert torch.equal(masks.snip(weight, gradient, 0.1), masks.snip(weight * scale, gradient / scale, 0.1))
    assert not torch.equal(masks.wm(weight, 0.1), masks.wm(weight * scale, 0.1))
    assert torch.equal(masks.snip(weight, gradient, 0.1), masks.wm(weight * gradient, 0.1))


def test_half_precision_weights_are_ranked_as_they_are():
    weight = drawn((30, 30)).bfloat16()
    assert torch.equal(masks.wm(weight, 0.1), masks.wm(weight.float(), 0.1))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_is_refused(bad):
    gradient = drawn((5, 5))
    gradient[2, 2] = bad
    with pytest.raises(AdapterBankError, match="nan or inf"):
        masks.grad(gradient, 0.1)
