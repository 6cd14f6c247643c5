import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adapterbank.errors import AdapterError
from adapterbank.shira.delta import SparseDelta
from sparse import Net, make_delta

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def copies(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal(model, before):
    return all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


# --- in place ---------------------------------------------------------------------------------------------------------


@dtypes
def test_apply_adds_the_dense_update_and_restore_brings_back_every_bit(dtype):
    model = Net().to(dtype)
    delta, before = make_delta(model), copies(model)
    saved = delta.apply_(model, alpha=0.7)
    for name, parameter in model.named_parameters():
        dense = delta.updates[name].dense() if name in delta.updates else torch.zeros_like(parameter).float()
        assert torch.equal(parameter, (before[name].float() + 0.7 * dense).to(dtype))
        touched = dense != 0
        assert torch.equal(parameter[~touched], before[name][~touched])
    delta.restore_(model, saved)
    assert equal(model, before)


@dtypes
@settings(deadline=None)
@given(order=st.lists(st.tuples(st.integers(0, 4), st.floats(-2, 2)), max_size=30))
def test_any_order_of_adapters_leaves_the_base_as_it_was(dtype, order):
    model = Net().to(dtype)
    deltas, before = [make_delta(model, seed=i) for i in range(5)], copies(model)
    for i, alpha in order:
        saved = deltas[i].apply_(model, alpha=alpha)
        deltas[i].restore_(model, saved)
    assert equal(model, before)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_strength_zero_is_the_base(dtype):
    torch.manual_seed(0)
    model = Net().to(dtype)
    if dtype == torch.float64:  # with digits that float32 hasn't
        model.body["q"].weight.data.normal_()
    before = copies(model)
    make_delta(model).apply_(model, alpha=0.0)
    assert equal(model, before)


def test_a_model_inside_another_one_is_found_by_its_names():
    model, before = Net(), copies(Net())
    outer = nn.ModuleDict({"wrapped": model})
    delta = make_delta(model, only=("body.q.weight",))
    saved = delta.apply_(outer)
    assert not torch.equal(model.body["q"].weight, before["body.q.weight"])
    delta.restore_(outer, saved)
    assert equal(model, before)


def test_a_part_that_several_parameters_fit_is_refused():
    delta = make_delta(Net())
    both = replace(delta, updates={f"{side}.first.weight": delta.updates["first.weight"] for side in ("one", "other")})
    model = Net()
    before = copies(model)
    with pytest.raises(AdapterError, match="several of its parameters fit one of the model's; give the whole model"):
        both.apply_(model)
    assert equal(model, before)


# --- refused, and nothing has changed ---------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_the_base_is_known_again_in_another_precision(dtype, stored):
    there, other = Net().to(stored).to(dtype), Net(seed=1).to(stored).to(dtype)
    delta = make_delta(Net().to(stored))
    delta.apply_(there)
    before = copies(other)
    with pytest.raises(AdapterError, match=r"first\.weight has other values|body\.q\.weight has other values"):
        delta.apply_(other)
    assert equal(other, before)
    delta.apply_(other, check=False)
    assert not equal(other, before)


def test_one_other_value_at_a_position_is_another_base():
    model = Net()
    delta = make_delta(model)
    with torch.no_grad():
        model.body["q"].weight.view(-1)[int(delta.updates["body.q.weight"].positions[3])] += 1e-3
    before = copies(model)
    with pytest.raises(AdapterError, match="is another adapter applied"):
        delta.apply_(model)
    assert equal(model, before)


def transposed(model):
    model.first.weight = nn.Parameter(model.first.weight.detach().T.contiguous().T)


def quantised(model):
    model.first.weight = nn.Parameter(torch.zeros(40, 30, dtype=torch.int8), requires_grad=False)


def on_meta(model):
    model.first.to("meta")


def tied(model):
    model.body["k"] = model.body["q"]


def wider(model):
    model.first = nn.Linear(31, 40)


def gone(model):
    del model.first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (transposed, r"no dense floating-point tensor of its own \(torch\.float32, strides"),
        (quantised, r"no dense floating-point tensor of its own \(torch\.int8"),
        (on_meta, "meta"),
        (wider, r"first\.weight is \(40, 30\), the model's first\.weight \(40, 31\)"),
        (gone, r"the model has no first\.weight"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(change, message):
    model = Net()
    delta = make_delta(model)
    change(model)
    before = copies(model)
    with pytest.raises(AdapterError, match=message):
        delta.apply_(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if not p.is_meta)


def test_a_tensor_of_two_names_is_refused():
    model = Net()
    tied(model)
    delta = make_delta(model, only=("body.q.weight",))
    with pytest.raises(AdapterError, match=r"body\.q\.weight and body\.k\.weight are one tensor of the model"):
        delta.apply_(model)


# --- from tensors -----------------------------------------------------------------------------------------------------


def test_positions_may_come_in_any_order_and_width():
    model = Net()
    delta = make_delta(model)
    update = delta.updates["first.weight"]
    order = torch.randperm(len(update.positions))
    again = SparseDelta.from_tensors(
        {"first.weight": (update.positions.long()[order], update.values[order])}, {"first.weight": (40, 30)}
    )
    assert torch.equal(again.updates["first.weight"].positions, update.positions)
    assert torch.equal(again.updates["first.weight"].values, update.values)
    assert again.updates["first.weight"].positions.dtype == torch.int32
    assert (again.nnz, again.density) == (120, 0.1)


@pytest.mark.parametrize(
    ("positions", "values", "message"),
    [
        ([1, 1], [0.0, 1.0], "ascend without repetition"), ([-1, 3], [0.0, 1.0], "reach from -1 to 3"),
        ([0, 12], [0.0, 1.0], r"reach from 0 to 12, \(3, 4\) has 12"), ([0, 1], [0.0, math.nan], "nan or inf"),
    ],
)  # fmt: skip
def test_impossible_positions_and_values_are_refused(positions, values, message):
    with pytest.raises(AdapterError, match=message):
        SparseDelta.from_tensors({"a.weight": (torch.tensor(positions), torch.tensor(values))}, {"a.weight": (3, 4)})


def test_a_missing_shape_and_unequal_lengths_are_refused():
    with pytest.raises(AdapterError, match=r"the shape of a\.weight is missing"):
        SparseDelta.from_tensors({"a.weight": (torch.tensor([1]), torch.tensor([1.0]))}, {})
    with pytest.raises(AdapterError, match=r"a\.weight: positions are torch\.int64 \(2,\), values .* \(1,\)"):
        SparseDelta.from_tensors({"a.weight": (torch.tensor([1, 2]), torch.tensor([1.0]))}, {"a.weight": (3, 4)})


@pytest.mark.parametrize("weights", [{}, {"a.weight": torch.zeros(4, 3)}], ids=["missing", "of another shape"])
def test_weights_that_are_not_the_base_s_are_refused(weights):
    tensors = {"a.weight": (torch.tensor([1]), torch.tensor([1.0]))}
    with pytest.raises(AdapterError, match=r"weights has no a\.weight of \(3, 4\); give those of its base"):
        SparseDelta.from_tensors(tensors, {"a.weight": (3, 4)}, weights=weights)


def test_a_delta_says_what_it_is():
    delta = make_delta(Net(), base="org/base", name="law")
    assert repr(delta) == "SparseDelta('law', base='org/base', nnz=280, density=10.00%, parameters=2)"
    assert replace(delta, updates={}).density == 0.0


# --- task heads, and what changes with a weight -----------------------------------------------------------------------


def test_a_head_is_put_in_and_taken_back():
    model, head = Net(), torch.randn(20)
    delta = make_delta(model, extras={"body.v.bias": head})
    before = copies(model)
    saved = delta.apply_(model, alpha=0.5)
    assert torch.equal(model.body["v"].bias, head)
    delta.restore_(model, saved)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    saved = delta.apply_(model, heads=False)
    assert torch.equal(model.body["v"].bias, before["body.v.bias"])
    delta.restore_(model, saved)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        ({"score.weight": torch.zeros(3, 40)}, r"brings its own score\.weight, \(3, 40\); the model's is missing"),
        ({"body.v.bias": torch.zeros(3)}, r"body\.v\.bias, \(3,\); the model's is \(20,\): load the base with such"),
    ],
)
def test_a_head_that_the_model_has_no_place_for_is_refused_and_changes_nothing(extras, message):
    model = Net()
    before = copies(model)
    with pytest.raises(AdapterError, match=message):
        make_delta(model, extras=extras).apply_(model)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_float8_weights_are_refused():
    model = Net()
    delta = make_delta(model)
    model.first.weight = nn.Parameter(model.first.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(AdapterError, match="no dense floating-point tensor"):
        delta.apply_(model)
    with pytest.raises(AdapterError, match=r"values torch\.float8_e4m3fn; give int32 or int64, and floats of 16 bits"):
        SparseDelta.from_tensors({"w": (torch.arange(2), torch.ones(2).to(torch.float8_e4m3fn))}, shapes={"w": (2, 2)})
