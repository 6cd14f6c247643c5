"""A small model, and sparse adapters of it."""

import torch
from torch import nn

from adapterbank.shira import masks
from adapterbank.shira.delta import SparseDelta


class Net(nn.Module):
    """Two linears of different shapes, one of them deeper."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(30, 40)
        self.body = nn.ModuleDict({"q": nn.Linear(40, 40, bias=False), "v": nn.Linear(40, 20)})


def make_delta(model, *, seed=0, density=0.1, scale=0.1, only=("first.weight", "body.q.weight"), **fields):
    """Random values at random positions."""
    weights = dict(model.named_parameters())
    tensors, drawn = {}, torch.Generator().manual_seed(seed)
    for name in only:
        positions = masks.rand(tuple(weights[name].shape), density, seed=seed, name=name)
        tensors[name] = positions, scale * torch.randn(len(positions), generator=drawn)
    shapes = {name: tuple(weights[name].shape) for name in only}
    return SparseDelta.from_tensors(tensors, shapes, weights=weights, **fields)
