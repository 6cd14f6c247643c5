import copy

import jaxtyping
import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from adapterbank.errors import AdapterBankError
from adapterbank.shira import masks
from adapterbank.shira.hooks import mask_gradients
from adapterbank.shira.tuner import ShiraTunerConfig, SparseLayer


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 24, bias=False), nn.Linear(24, 16, bias=False)

    def forward(self, x):
        return self.b(self.a(x).tanh())


def data():
    seeded = torch.Generator().manual_seed(1)
    return [torch.randn(32, 16, generator=seeded) for _ in range(6)]


def positions_of(model):
    return {f"{n}.weight": masks.wm(getattr(model, n).weight, 0.1) for n in ("a", "b")}


def checkpointed(model):
    return lambda x: checkpoint(model, x, use_reentrant=False)


def compiled(model):
    return torch.compile(model, backend="aot_eager")


def in_bfloat16(model):
    return torch.autocast("cpu", torch.bfloat16)(model)


def train(model, optimizer, *, accumulate=1, clip=None, how=lambda model: model):
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norms, forward = [], how(model)
    for _ in range(5):
        for x in data()[:accumulate]:
            (forward(x).float() - x.flip(1)).square().mean().div(accumulate).backward()
        if clip is not None:
            norms.append(float(nn.utils.clip_grad_norm_(parameters, clip)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0),
}


WAYS = {
    "plainly": {},
    "accumulating": {"accumulate": 3},
    "clipping": {"clip": 0.05},
    "checkpointed": {"how": checkpointed},
    "compiled": {"how": compiled},
    "bfloat16": {"how": in_bfloat16},
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_weights_that_are_masked_out_stay_to_the_bit(kind):
    model = Net()
    before, positions = copy.deepcopy(model.state_dict()), positions_of(model)
    optimizer = OPTIMIZERS[kind](model.parameters())
    with mask_gradients(model, positions, optimizer) as masked:
        train(model, optimizer, accumulate=2)
    for name, place in positions.items():
        moved = (model.state_dict()[name] != before[name]).flatten()
        assert not moved[~torch.isin(torch.arange(moved.numel()), place)].any()
        assert moved[place.long()].float().mean() > 0.9
    fresh = Net()
    masked.delta().apply_(fresh)
    for name in positions:
        torch.testing.assert_close(fresh.get_parameter(name), model.get_parameter(name), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_the_hooks_and_the_tuner_learn_the_same(kind, options, monkeypatch):
    if options.get("how") is compiled:
        monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its checks can't be traced
    dense, base = Net(), Net()
    positions = positions_of(dense)
    optimizer = OPTIMIZERS[kind](dense.parameters())
    with mask_gradients(dense, positions, optimizer):
        one = train(dense, optimizer, **options)
    sparse = get_peft_model(base, ShiraTunerConfig(density=0.1, mask="wm", target_modules=["a", "b"]))
    optimizer = OPTIMIZERS[kind]([p for p in sparse.parameters() if p.requires_grad])
    other = train(sparse, optimizer, **options)
    rounded = options.get("how") is in_bfloat16  # the hooks' gradient to 16 bits, before it is masked
    assert one == pytest.approx(other, rel=1e-3)  # of the masked gradient
    for name, layer in sparse.named_modules():
        if isinstance(layer, SparseLayer):
            found = layer.base_layer.weight + layer.get_delta_weight("default")
            weight = dense.get_parameter(f"{name.rpartition('.')[2]}.weight")
            near = 1e-6 if kind in ("SGD", "momentum") else 1e-5
            if rounded:
                near = 0.02 * float((weight - layer.base_layer.weight).detach().abs().max())
            torch.testing.assert_close(found, weight, rtol=0, atol=near)


def test_decay_of_weights_without_a_gradient_is_refused():
    model = Net()
    optimizer = torch.optim.AdamW(
        [{"params": [model.a.weight], "weight_decay": 0.0}, {"params": [model.b.weight], "weight_decay": 0.1}]
    )
    with pytest.raises(AdapterBankError, match=r"weight_decay=0\.1 for b\.weight.*a group with weight_decay=0"):
        mask_gradients(model, positions_of(model), optimizer)
    mask_gradients(model, {"a.weight": positions_of(model)["a.weight"]}, optimizer).remove()


def test_what_is_missing_or_frozen_is_refused():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(AdapterBankError, match=r"no parameter c\.weight"):
        mask_gradients(model, {"c.weight": torch.tensor([1])}, optimizer)
    other = torch.optim.SGD([model.b.weight], lr=0.1)
    with pytest.raises(AdapterBankError, match=r"the optimiser doesn't train a\.weight"):
        mask_gradients(model, positions_of(model), other)
    model.a.weight.requires_grad_(False)
    with pytest.raises(AdapterBankError, match=r"a\.weight is frozen"):
        mask_gradients(model, positions_of(model), optimizer)


def test_what_is_no_matrix_is_refused():
    model = nn.Sequential(nn.Linear(4, 6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(AdapterBankError, match=r"0\.bias is \(6,\): sparse adapters change matrices"):
        mask_gradients(model, {"0.bias": torch.tensor([1])}, optimizer)


@pytest.mark.parametrize(("first", "last"), [(-1, 3), (0, 24)])
def test_positions_outside_of_a_parameter_are_refused(first, last):
    model = nn.Linear(4, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(AdapterBankError, match=f"weight: positions reach from {first} to {last}, it has 24 weights"):
        mask_gradients(model, {"weight": torch.tensor([first, 2, last])}, optimizer)


def test_a_parameter_that_is_not_stored_row_by_row_is_refused():
    model = nn.Linear(4, 6)
    model.weight = nn.Parameter(torch.randn(4, 6).T)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(AdapterBankError, match=r"weight has strides \(1, 6\).* make it contiguous"):
        mask_gradients(model, {"weight": torch.tensor([2])}, optimizer)


def test_when_the_masks_are_off_everything_trains():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mask_gradients(model, positions_of(model), optimizer).remove()
    before = model.a.weight.detach().clone()
    train(model, optimizer)
    assert (model.a.weight != before).float().mean() > 0.9
