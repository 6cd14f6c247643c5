from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from torch import nn

from adapterbank.errors import AdapterBankError
from adapterbank.shira import masks
from adapterbank.shira.tuner import ShiraTunerConfig, SparseLayer, calibrate
from tiny_models import TARGETS, bert, llama


def config(**fields):
    return ShiraTunerConfig(**{"density": 0.05, "mask": "snip", "target_modules": list(TARGETS["llama"]), **fields})


@pytest.fixture
def batches():
    seeded = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 50, (4, 7), generator=seeded) for _ in range(3)]
    return [{"input_ids": x, "labels": x} for x in ids]


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, SparseLayer)}


def dense_gradients(batches, how="abs_of_sum"):
    """Of the plain base model."""
    model = llama()
    wanted = [n for n, _ in model.named_parameters() if n.split(".")[-2] in TARGETS["llama"]]
    sums = {name: 0 for name in wanted}
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        for name in wanted:
            gradient = model.get_parameter(name).grad
            sums[name] = sums[name] + (gradient.abs() if how == "sum_of_abs" else gradient)
    return sums


@pytest.mark.parametrize("mask", ["grad", "snip"])
@pytest.mark.parametrize("how", ["abs_of_sum", "sum_of_abs"])
@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("at_once", [None, 1, 4])
def test_the_positions_are_those_of_the_dense_gradient(batches, mask, how, part, at_once):
    model = get_peft_model(llama(), config(mask=mask, part=part))
    calibrate(model, batches, how=how, layers_at_once=at_once)
    gradients, base = dense_gradients(batches, how), llama()
    for name, layer in layers(model).items():
        parameter = name.removeprefix("base_model.model.") + ".weight"
        scores = gradients[parameter] * (base.get_parameter(parameter) if mask == "snip" else 1)
        expected = masks.wm(scores.detach(), 0.05, part=part)
        found = layer.sparse_positions["default"]
        assert len(found) == len(expected)
        # sums in another order round differently: a few at the edge may differ
        assert torch.isin(found, expected).float().mean() > 0.95


def test_everything_else_is_left_as_found(batches):
    model = get_peft_model(llama(), config())
    model.train()
    model.base_model.model.model.layers[0].eval()
    model.get_input_embeddings().weight.requires_grad_(True)
    model.get_input_embeddings().weight.grad = torch.ones_like(model.get_input_embeddings().weight)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    before = {
        n: (p.detach().clone(), p.requires_grad, p.grad) for n, p in model.named_parameters() if "sparse" not in n
    }
    modes = {n: m.training for n, m in model.named_modules()}
    calibrate(model, batches)
    assert torch.equal(torch.get_rng_state(), state)
    assert {n: m.training for n, m in model.named_modules()} == modes
    for name, parameter in model.named_parameters():
        if name in before:
            value, flag, gradient = before[name]
            assert torch.equal(parameter, value) and parameter.requires_grad == flag and parameter.grad is gradient
    values = {n: p for n, p in model.named_parameters() if "sparse_values" in n}
    assert all(p.requires_grad and not p.any() for p in values.values())


def test_it_tells_how_far_it_is(batches):
    model, told = get_peft_model(llama(), config()), []
    calibrate(model, batches, layers_at_once=4, progress=lambda *words: told.append(words))
    # six layers are two rounds of three batches
    assert told == [("sum gradients", done, 6) for done in range(1, 7)]


def test_afterwards_it_trains_saves_and_loads(batches, tmp_path):
    from peft import PeftModel

    model = get_peft_model(llama(), config(task_type="CAUSAL_LM"))
    calibrate(model, batches)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(**batches[0]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(loaded(**batches[0]).logits, model.eval()(**batches[0]).logits)


def test_a_head_of_zeros_is_fitted_for_the_while_and_put_back(batches):
    base = bert()
    base.classifier.weight.data.zero_()
    model = get_peft_model(base, config(target_modules=list(TARGETS["bert"]), modules_to_save=["classifier"]))
    labelled = [{"input_ids": b["input_ids"], "labels": torch.randint(0, 3, (4,))} for b in batches]
    calibrate(model, labelled)
    assert all(not p.any() for n, p in model.named_parameters() if "classifier" in n and n.endswith("weight"))
    firsts = [layer.sparse_positions["default"] for layer in layers(model).values()]
    assert all(len(positions) for positions in firsts)
    # without a gradient all scores are zero and the first positions win the ties
    assert any(int(positions[-1]) >= len(positions) for positions in firsts)


class Planted(nn.Module):
    """One linear layer."""

    def __init__(self, weight):
        super().__init__()
        self.linear = nn.Linear(*reversed(weight.shape), bias=False)
        self.linear.weight.data = weight.clone()

    def forward(self, x, y):
        return SimpleNamespace(loss=(self.linear(x) - y).square().mean())


def test_a_planted_support_is_found_by_its_gradient_and_not_by_magnitude():
    # T-S2: the teacher differs from the base at random positions
    torch.manual_seed(0)
    base, planted = torch.randn(64, 48), masks.rand((64, 48), 0.02, seed=4)
    teacher = base.clone()
    teacher.view(-1)[planted.long()] += torch.randn(len(planted)).sign() * 2
    x = torch.randn(4096, 48)
    batches = [{"x": part, "y": part @ teacher.T} for part in x.split(512)]
    found = {}
    for mask in ("grad", "snip", "wm"):
        model = get_peft_model(Planted(base), config(mask=mask, density=0.02, target_modules=["linear"]))
        if mask != "wm":
            calibrate(model, batches)
        (layer,) = layers(model).values()
        found[mask] = float(torch.isin(layer.sparse_positions["default"], planted).float().mean())
    assert found["grad"] > 0.9
    assert found["snip"] > 0.7  # weights near zero score low however large their gradient is
    assert found["wm"] < 0.2


@pytest.mark.parametrize("mask", ["grad", "snip"])
def test_other_adapters_on_other_layers_do_not_matter(batches, mask):
    found = []
    for other in (False, True):
        model = get_peft_model(llama(), config(mask="wm", density=0.5, target_modules=["k_proj", "up_proj"]))
        for layer in layers(model).values():
            layer.sparse_values["default"].data.normal_().mul_(0.3 if other else 0.0)
        model.add_adapter("second", config(mask=mask))
        model.base_model.set_adapter(["default", "second"])
        calibrate(model, batches, adapter_name="second")
        found.append(
            [layer.sparse_positions["second"] for layer in layers(model).values() if "second" in layer.scaling]
        )
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_an_optimiser_may_be_made_before(batches):
    model = get_peft_model(llama(), config())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    calibrate(model, batches)
    model.train()(**batches[0]).loss.backward()
    optimizer.step()
    assert all(layer.sparse_values["default"].any() for layer in layers(model).values())


def test_the_config_tells_how_it_was_done(batches, tmp_path):
    model = get_peft_model(llama(), config())
    assert model.peft_config["default"].calibration is None
    calibrate(model, batches, how="sum_of_abs", most_batches=2)
    model.save_pretrained(tmp_path)
    assert ShiraTunerConfig.from_pretrained(tmp_path).calibration == {"how": "sum_of_abs", "batches": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.set_adapter("second"), r"'default' isn't active.*model\.set_adapter\('default'\)"),
        (lambda model: model.merge_adapter(["second"]), "second is merged into the base model; unmerge it first"),
    ],
    ids=["inactive", "merged"],
)
def test_another_adapter_must_not_stand_in_the_way(batches, change, message):
    model = get_peft_model(llama(), config())
    model.add_adapter("second", config(mask="rand", target_modules=["k_proj"]))
    change(model)
    with pytest.raises(AdapterBankError, match=message):
        calibrate(model, batches)


def test_it_goes_again_until_the_adapter_is_trained(batches):
    model = get_peft_model(llama(), config())
    for _ in range(2):
        calibrate(model, batches)
    next(iter(layers(model).values())).sparse_values["default"].data += 1
    with pytest.raises(AdapterBankError, match="'default' was trained; calibrate a fresh one"):
        calibrate(model, batches)


def test_a_layer_that_the_loss_does_not_reach_is_named(batches):
    base = bert()
    base.classifier.weight.data.zero_()  # and stays, as no module to save
    labelled = [{"input_ids": b["input_ids"], "labels": torch.randint(0, 3, (4,))} for b in batches]
    model = get_peft_model(base, config(target_modules=list(TARGETS["bert"])))
    with pytest.raises(AdapterBankError, match=r"no gradient in bert\.encoder\.layer\.0\.attention\.self\.query"):
        calibrate(model, labelled)


@pytest.mark.parametrize(
    ("fields", "call", "message"),
    [
        ({"mask": "wm"}, {}, "has its positions: mask='wm' needs no gradient"),
        ({}, {"adapter_name": "other"}, "no sparse adapter 'other'"),
        ({}, {"how": "mean"}, "how='mean' is unknown"),
        ({}, {"batches": []}, "there are no batches"),
        ({}, {"loss": lambda model, batch: model(**batch).loss * float("nan")}, "nan or inf"),
    ],
)
def test_what_can_not_be_calibrated_is_refused_and_stays_as_it_is(batches, fields, call, message):
    model = get_peft_model(llama(), config(**fields))
    before = {n: layer.sparse_positions["default"].clone() for n, layer in layers(model).items()}
    with pytest.raises(AdapterBankError, match=message):
        calibrate(model, call.pop("batches", batches), **call)
    assert all(torch.equal(layer.sparse_positions["default"], before[n]) for n, layer in layers(model).items())
