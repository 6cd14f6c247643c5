"""What is timed does what it says."""

import torch
from benchmarks.sparse_switch import overwrites

from sparse import Net, make_delta


def test_every_way_to_overwrite_is_a_switch():
    names = ("body.q.weight", "first.weight")
    deltas = [make_delta(Net(), seed=i, only=names) for i in range(2)]
    base = torch.cat([dict(Net().named_parameters())[name].detach().flatten() for name in names])
    expected = []
    for delta in deltas:
        model = Net()
        delta.apply_(model)
        expected.append(torch.cat([dict(model.named_parameters())[name].detach().flatten() for name in names]))
    for buffer, switch in overwrites(base, deltas, 0).values():
        for i in (0, 1, 1, 0):
            switch(i)
            torch.testing.assert_close(buffer, expected[i], rtol=0, atol=0)
