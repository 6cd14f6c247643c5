"""Planted truth: what sparse adapters must find, and what fusing them must and must not do (spec 1.11)."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from adapterbank.shira import ShiraTunerConfig, SparseDelta, fuse, masks
from adapterbank.shira.tuner import SparseLayer

SIZE, RANK = 48, 1
DENSITY = 2 * RANK / SIZE
"""As many values as a LoRA of that rank has."""


class Net(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.linear = nn.Linear(*reversed(weight.shape), bias=False)
        self.linear.weight.data = weight.clone()

    def forward(self, x):
        return self.linear(x)


def base():
    return torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def changed(weight, positions, seed=1, sign=1.0):
    teacher = weight.clone()
    values = torch.randn(len(positions), generator=torch.Generator().manual_seed(seed))
    teacher.view(-1)[positions.long()] += sign * (values + values.sign())
    return teacher


def fit(model, x, y, *, lr, steps):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = (model(x) - y).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return float((model(x) - y).detach().square().sum())


def delta_of(model):
    (layer,) = (m for m in model.modules() if isinstance(m, SparseLayer))
    tensors = {"linear.weight": (layer.sparse_positions["default"], layer.sparse_values["default"].detach())}
    return SparseDelta.from_tensors(tensors, {"linear.weight": layer.shape})


def test_a_sparse_teacher_is_matched_and_a_lora_of_as_many_values_keeps_its_eckart_young_floor():
    weight, x = base(), torch.eye(SIZE)  # the loss is then the squared distance of the weights
    teacher = changed(weight, masks.wm(weight, DENSITY))
    sparse = get_peft_model(Net(weight), ShiraTunerConfig(density=DENSITY, mask="wm", target_modules=["linear"]))
    lora = get_peft_model(Net(weight), LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["linear"]))
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (sparse, lora)]
    assert counts[0] == counts[1]
    singular = torch.linalg.svdvals(teacher - weight)
    floor = float(singular[RANK:].square().sum())
    assert fit(sparse, x, x @ teacher.T, lr=0.1, steps=300) < 1e-4 * floor
    reached = fit(lora, x, x @ teacher.T, lr=0.05, steps=800)
    assert floor * 0.999 <= reached <= floor * 1.05


def trained(weight, teacher, positions, x):
    model = get_peft_model(Net(weight), ShiraTunerConfig(mask="rand", target_modules=["linear"]))
    (layer,) = (m for m in model.modules() if isinstance(m, SparseLayer))
    layer.put_in("default", positions)
    assert fit(model, x, x @ teacher.T, lr=0.1, steps=300) < 1e-3
    return delta_of(model)


@pytest.mark.parametrize("overlapping", [False, True])
def test_fused_tasks_are_both_solved_where_their_supports_are_apart_and_not_where_they_cancel(overlapping):
    weight, half = base(), SIZE // 2
    every = masks.rand((SIZE, SIZE), 0.1)
    left, right = every[every % SIZE < half], every[every % SIZE >= half]
    # each task sees its own half of the features
    xs = list(torch.eye(SIZE).split(half))
    if overlapping:  # the same features and positions, the opposite wish
        places, xs = [left, left], [xs[0], xs[0]]
        teachers = [changed(weight, left, sign=sign) for sign in (1.0, -1.0)]
    else:
        places = [left, right]
        teachers = [changed(weight, place, seed=i) for i, place in enumerate(places)]
    deltas = [trained(weight, t, p, x) for t, p, x in zip(teachers, places, xs, strict=True)]
    fused = copy.deepcopy(Net(weight))
    fuse({"one": deltas[0], "two": deltas[1]}).apply_(fused)
    for teacher, x in zip(teachers, xs, strict=True):
        before = float((x @ weight.T - x @ teacher.T).square().sum())
        after = float((fused(x) - x @ teacher.T).detach().square().sum())
        assert after > 0.9 * before if overlapping else after < 1e-3 * before


def test_strength_moves_the_loss_smoothly_from_the_base_model():
    weight, x = base(), torch.eye(SIZE)
    positions = masks.wm(weight, DENSITY)
    teacher = changed(weight, positions)
    delta, losses = trained(weight, teacher, positions, x), []
    for alpha in torch.linspace(0, 1.25, 11).tolist():
        model = Net(weight)
        delta.apply_(model, alpha=alpha)
        losses.append(float((model(x) - x @ teacher.T).detach().square().sum()))
    assert losses[0] == pytest.approx(float((weight - teacher).square().sum()), rel=1e-5)
    # (1 - alpha)^2 of the first
    expected = [losses[0] * (1 - alpha) ** 2 for alpha in torch.linspace(0, 1.25, 11).tolist()]
    assert losses == pytest.approx(expected, rel=1e-2, abs=1e-2)
