"""SHiRA-DoRA beside what it is made of: PEFT's DoRA, a dense formula, and a plain sparse adapter."""

import jaxtyping
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapterbank.errors import AdapterError
from adapterbank.shira import ShiraTunerConfig, SparseDelta, calibrate, sampling
from adapterbank.shira.tuner import SparseLayer
from adapterbank.shira.tuner.dora import entries
from tiny_models import llama

D_IN, D_OUT, RANK = 12, 20, 3


class Net(nn.Module):
    def __init__(self, conv1d=False):
        super().__init__()
        torch.manual_seed(0)
        self.linear = Conv1D(D_OUT, D_IN) if conv1d else nn.Linear(D_IN, D_OUT)
        self.linear.weight.data.normal_()

    def forward(self, x):
        return self.linear(x)


def adapted(net, **fields):
    """As if trained for a while."""
    options = {"density": 0.2, "dora_rank": RANK, "target_modules": ["linear"], **fields}
    model = get_peft_model(net, ShiraTunerConfig(**options))
    (layer,) = (m for m in model.modules() if isinstance(m, SparseLayer))
    dora, seeded = layer.sparse_dora["default"], torch.Generator().manual_seed(1)
    with torch.no_grad():
        dora.B.copy_(torch.randn(dora.B.shape, generator=seeded))
        dora.magnitude.mul_(1 + 0.2 * torch.randn(D_OUT, generator=seeded))
    return model, layer, dora


@pytest.fixture
def x():
    return torch.randn(7, D_IN, generator=torch.Generator().manual_seed(2), requires_grad=True)


@pytest.fixture(params=[1 << 24, 256], ids=["whole", "slices"])
def slices(request, monkeypatch):
    monkeypatch.setattr(sampling, "SLICE_BYTES", request.param)


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("density", [0.03, 0.2, 1.0])
@pytest.mark.usefixtures("slices")
def test_the_layer_and_its_gradients_are_those_of_the_dense_formula(x, conv1d, density):
    _, layer, dora = adapted(Net(conv1d), density=density)
    base = layer.base_layer
    base.requires_grad_(True)
    everything = [x, base.weight, base.bias, dora.A, dora.B, dora.magnitude]
    W = base.weight.T if conv1d else base.weight
    mask = torch.zeros(base.weight.numel()).index_fill(0, layer.sparse_positions["default"].long(), 1.0)
    mask = mask.view(base.weight.shape).T if conv1d else mask.view(base.weight.shape)
    directed = W + dora.B @ dora.A
    scaled = dora.magnitude[:, None] * directed / directed.detach().norm(dim=1, keepdim=True)
    expected = x @ (W + mask * (scaled - W)).T + base.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(layer(x).square().sum(), everything)
    theirs = torch.autograd.grad(expected.square().sum(), everything)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_with_every_weight_in_the_mask_it_is_the_dora_of_peft(x):
    _, layer, dora = adapted(Net(), density=1.0)
    peft = get_peft_model(Net(), LoraConfig(r=RANK, lora_alpha=RANK, use_dora=True, target_modules=["linear"]))
    weights = dict(peft.named_parameters())
    A, B, magnitude = (next(p for n, p in weights.items() if part in n) for part in ("lora_A", "lora_B", "magnitude"))
    for theirs, ours in ((A, dora.A), (B, dora.B), (magnitude, dora.magnitude)):
        theirs.data = ours.detach().clone()
    torch.testing.assert_close(layer(x), peft(x), rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(layer(x).square().sum(), [x, dora.A, dora.B, dora.magnitude])
    theirs = torch.autograd.grad(peft(x).square().sum(), [x, A, B, magnitude])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("slices")
def test_it_begins_as_the_base_to_the_bit_also_where_that_has_zeros(x, conv1d, dtype):
    net = Net(conv1d).to(dtype)
    (net.linear.weight.T if conv1d else net.linear.weight).data[4] = 0
    model = get_peft_model(net, ShiraTunerConfig(density=1.0, dora_rank=RANK, target_modules=["linear"]))
    (layer,) = (m for m in model.modules() if isinstance(m, SparseLayer))
    assert not layer.values("default").any()
    assert torch.equal(layer(x.to(dtype)), layer.base_layer(x.to(dtype)))
    layer(x.to(dtype)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.sparse_dora.parameters())


@pytest.mark.parametrize("conv1d", [False, True])
def test_no_more_than_the_mask_changes(conv1d):
    # S40
    model, layer, _ = adapted(Net(conv1d))
    before, positions = Net(conv1d).linear.weight.data, layer.sparse_positions["default"]
    model.merge_adapter()
    changed = (layer.base_layer.weight.data != before).flatten().nonzero()[:, 0]
    assert torch.isin(changed, positions).all() and len(changed) > 0.9 * len(positions)


@pytest.mark.parametrize("conv1d", [False, True])
def test_it_is_exported_as_a_plain_sparse_adapter(x, conv1d, tmp_path):
    # S41
    model, layer, _ = adapted(Net(conv1d))
    SparseDelta.from_peft(model).save(tmp_path, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(Net(conv1d), tmp_path)
    assert loaded.peft_config["default"].dora_rank == 0
    torch.testing.assert_close(loaded(x), layer(x), rtol=1e-6, atol=1e-6)
    applied = Net(conv1d)
    SparseDelta.load(tmp_path).apply_(applied)
    torch.testing.assert_close(applied(x), layer(x), rtol=1e-5, atol=1e-5)


def test_training_goes_on_from_a_file_as_if_it_had_not_stopped(x, tmp_path):
    def train(model, steps):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(steps):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model(x).detach()

    whole, other = adapted(Net())[0], adapted(Net())[0]
    other.load_state_dict(whole.state_dict())  # the same A
    expected = train(whole, 6)
    train(other, 3)
    other.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="it is a DoRA in training"):  # no plain sparse adapter, but what makes one
        SparseDelta.load(tmp_path)
    assert torch.equal(train(PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True), 3), expected)
    assert not torch.equal(expected, Net()(x))


def test_what_autocast_does_not_touch(x):
    _, layer, _ = adapted(Net())
    expected = layer.values("default")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.values("default"), expected)


def test_no_rank_is_above_that_of_the_weight():
    model = get_peft_model(Net(), ShiraTunerConfig(dora_rank=10**9, target_modules=["linear"]))
    assert {tuple(p.shape) for n, p in model.named_parameters() if "sparse_dora" in n} == {
        (D_IN, D_IN), (D_OUT, D_IN), (D_OUT,)
    }  # fmt: skip


@pytest.mark.parametrize("transposed", [False, True])
def test_the_operator_is_one_for_torch(transposed, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    weight = torch.randn((D_IN, D_OUT) if transposed else (D_OUT, D_IN), requires_grad=True)
    A, B = torch.randn(RANK, D_IN, requires_grad=True), torch.randn(D_OUT, RANK, requires_grad=True)
    torch.library.opcheck(entries, (weight, A, B, torch.tensor([0, 5, 130, 239], dtype=torch.int32), transposed))


def test_a_mask_by_the_gradient_goes_with_it():
    rows = torch.randint(3, 50, (4, 6), generator=torch.Generator().manual_seed(2))
    batch = {"input_ids": rows, "labels": rows}
    fields = {"density": 0.1, "mask": "snip", "dora_rank": 4, "target_modules": ["q_proj", "v_proj"]}
    model = get_peft_model(llama(), ShiraTunerConfig(**fields))
    calibrate(model, [batch])
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), []
    for _ in range(8):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
