"""Planted truth (spec.md 2.16): a teacher whose update lies in the bank's subspace, or partly outside of it."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from adapterbank.adapters import LoraAdapter, LoraFactors
from adapterbank.bank import Bank
from adapterbank.tuner import augment, optimizer_groups
from adapterbank.tuner.layer import EigenLoraLayer
from tiny_models import eigen

D, SHARED, RANK = 24, 6, 2


class Stack(nn.Module):
    """Two linear layers side by side: one after the other, their updates couldn't be told apart."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(D, D, bias=False)}) for _ in range(2))

    def forward(self, x):
        return torch.stack([layer["proj"](x) for layer in self.layers])


def directions(seed):
    seeded = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(D, D, generator=seeded))[0]


def update(seed, delta):
    """An update of rank 2 on shared directions; a share ``delta`` of each factor's rows lies outside of them."""
    seeded = torch.Generator().manual_seed(seed)
    found = {}
    for i in range(2):
        V, U = directions(10 + i), directions(20 + i)
        parts = []
        for basis in (V, U):
            inside = torch.randn(RANK, SHARED, generator=seeded) @ basis[:SHARED]
            outside = torch.randn(RANK, 1, generator=seeded) @ basis[-1:]  # one missing direction
            parts.append(
                (1 - delta**2) ** 0.5 * inside / inside.norm(dim=1, keepdim=True)
                + delta * outside / outside.norm(dim=1, keepdim=True)
            )
        found[f"layers.{i}.proj"] = LoraFactors(A=parts[0], B=0.5 * parts[1].T, scale=1.0)
    return found


@pytest.fixture(scope="module")
def bank():
    adapters = [LoraAdapter.from_factors(f"a{i}", update(i, 0.0), base="b") for i in range(6)]
    return Bank.fit(adapters, k=SHARED, quantize=False)


def teach(delta):
    """Inputs, the teacher's outputs, and its update."""
    teacher, task = Stack(), update(100, delta)
    for name, factors in task.items():
        teacher.get_submodule(name).weight.data += factors.update()
    # white, so that the gradient is the update and nothing else
    x = torch.linalg.qr(torch.randn(256, D, generator=torch.Generator().manual_seed(5)))[0] * 256**0.5
    with torch.no_grad():
        return x, teacher(x), task


def mse(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


def error_after_training(bank, delta, *, gradient=0, steps=400, **fields):
    """Relative error of the learned update against the teacher's."""
    x, y, task = teach(delta)
    torch.manual_seed(1)
    model = get_peft_model(Stack(), eigen(bank, r=4, k=SHARED, **fields))
    if gradient:
        augment(model, [(x, y)], gradient, loss=mse, bits=8)
    groups = optimizer_groups(model, component_lr=2e-2)
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = mse(model, (x, y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    layers = {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, EigenLoraLayer)}
    lost = sum((m.get_delta_weight("default").detach() - task[n].update()).square().sum() for n, m in layers.items())
    return float((lost / sum(f.update().square().sum() for f in task.values())).sqrt())


def test_a_task_inside_the_subspace_is_learned_exactly(bank):
    assert error_after_training(bank, 0.0, steps=600) < 1e-3


def test_the_core_learns_it_too(bank):
    assert error_after_training(bank, 0.0, train="core") < 1e-3


def test_a_task_outside_of_the_subspace_is_not_learned(bank):
    # what lies outside on either side is lost, at least
    assert error_after_training(bank, 0.6) > 0.5


@pytest.mark.parametrize(
    "way",
    [{"gradient": 2}, {"free_rank": 2}, {"edge_layers": 1}, {"train": "components"}, {"random_directions": D - SHARED}],
    ids=["gradient", "free", "edge", "components", "random, all there are"],
)
def test_what_adds_the_missing_component_learns_it(bank, way):
    assert error_after_training(bank, 0.6, steps=600, **way) < 0.1


def test_a_few_random_directions_do_not_help_much(bank):
    assert error_after_training(bank, 0.6, random_directions=2) > 0.4
