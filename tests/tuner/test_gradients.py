import pytest
import torch
from peft import get_peft_model

from adapterbank.bank import Bank
from adapterbank.codec.rows import unpack_rows
from adapterbank.errors import AdapterBankError
from adapterbank.tuner import augment, export_lora, load, nearest
from adapterbank.tuner.layer import EigenLoraLayer
from tiny_models import TARGETS, adapters_for, bert, eigen, llama, perturb


@pytest.fixture
def batches(inputs):
    return [inputs | {"labels": inputs["input_ids"]}, inputs | {"labels": inputs["input_ids"].flip(0)}]


@pytest.fixture
def fresh(bank_dir):
    return get_peft_model(llama(), eigen(bank_dir, task_type="CAUSAL_LM"))


def layers(model):
    return {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, EigenLoraLayer)}


def dense_gradients(batches):
    """The gradients of the base weights themselves."""
    model = llama()
    for batch in batches:
        model(**batch).loss.backward()
    return {n: p.grad for n, p in model.named_parameters()}


def test_the_directions_are_the_leading_ones_of_the_dense_gradient(fresh, batches):
    before = dense_gradients(batches)
    augment(fresh, batches, 3, bits=8)
    for name, layer in layers(fresh).items():
        gradient, basis = before[f"{name}.weight"], layer.basis_of["default"]
        for packed, dense, known in (
            (layer.eig_gradient_in["default"], gradient, basis.V),
            (layer.eig_gradient_out["default"], gradient.T, basis.U.T),
        ):
            rest = dense - dense @ known.T @ known
            found = unpack_rows(packed, dense.shape[1], 8)
            _, S, _ = torch.linalg.svd(rest)
            # as much of the gradient's energy as any three directions outside of the basis (Eckart-Young)
            kept = (rest @ found.T).square().sum()
            assert kept > 0.97 * S[:3].square().sum()
            torch.testing.assert_close(found @ known.T, torch.zeros(3, len(known)), rtol=0, atol=0.02)
            torch.testing.assert_close(found @ found.T, torch.eye(3), rtol=0, atol=0.03)


def test_augmenting_changes_no_output_and_leaves_the_model_as_it_was(fresh, batches, inputs):
    fresh.train()
    expected = fresh.eval()(**inputs).logits
    fresh.train()
    state = torch.random.get_rng_state()
    augment(fresh, batches, 3)
    assert fresh.training
    assert all(p.grad is None for p in fresh.parameters())
    fresh.eval()
    torch.testing.assert_close(fresh(**inputs).logits, expected, rtol=0, atol=0)
    assert {n for n, p in fresh.named_parameters() if p.requires_grad} == {
        n for n, p in fresh.named_parameters() if ".eig_coef_" in n
    }
    assert not torch.equal(torch.random.get_rng_state(), state)  # the new coefficients are drawn


def test_training_goes_on_after_loading(fresh, batches, inputs, tmp_path, bank_dir):
    augment(fresh, batches, 4)
    perturb(fresh).eval()
    fresh.save_pretrained(tmp_path / "task")
    loaded = load(llama(), tmp_path / "task", bank=bank_dir, is_trainable=True).eval()
    torch.testing.assert_close(loaded(**inputs).logits, fresh(**inputs).logits, rtol=0, atol=0)
    loaded(**batches[0]).loss.backward()
    assert all(p.grad is not None for p in loaded.parameters() if p.requires_grad)


def test_as_a_lora_it_has_the_rank_of_the_coefficients(fresh, batches):
    augment(fresh, batches, 4)
    assert export_lora(perturb(fresh)).rank == 4


def test_the_head_is_fitted_first_and_put_back(bank_dirs, inputs):
    batch = inputs | {"labels": torch.tensor([0, 1, 2, 0])}

    def augmented(steps):
        model = get_peft_model(bert(), eigen(bank_dirs["bert"], task_type="SEQ_CLS"))
        head = model.base_model.model.classifier.modules_to_save["default"]
        head.weight.data.zero_()  # no gradient reaches the layers
        augment(model, [batch], 2, head_steps=steps)
        assert not head.weight.any()
        assert head.weight.requires_grad and head.weight.grad is None
        return layers(model).values()

    assert all(layer.eig_gradient_in["default"].any() for layer in augmented(30))
    unseen = [unpack_rows(layer.eig_gradient_in["default"], layer.in_features, 4) for layer in augmented(0)]
    assert not any(rows.any() for rows in unseen)


def test_any_loss_will_do(fresh, inputs):
    augment(fresh, [inputs["input_ids"]], 2, loss=lambda model, ids: model(input_ids=ids).logits.square().mean())
    assert fresh.peft_config["default"].gradient_directions == 2


def test_a_start_outlives_augmenting(bank_dir, batches, inputs):
    model = get_peft_model(llama(), eigen(bank_dir, start="member:a0")).eval()
    expected = model(**inputs).logits
    augment(model, batches, 3)
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-6)
    model(**batches[0]).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_the_gradient_is_that_of_the_active_adapter(bank_dirs, inputs):
    model = get_peft_model(bert(), eigen(bank_dirs["bert"], task_type="SEQ_CLS"))
    model.add_adapter("second", eigen(bank_dirs["bert"], task_type="SEQ_CLS"))
    batch = inputs | {"labels": torch.tensor([0, 1, 2, 0])}
    with pytest.raises(AdapterBankError, match="'second' is not the one active adapter"):
        augment(model, [batch], 2, adapter_name="second")
    model.set_adapter("second")
    augment(model, [batch], 2, adapter_name="second")
    assert all("second" in layer.eig_gradient_in for layer in layers(model).values())
    assert not any("default" in layer.eig_gradient_in for layer in layers(model).values())
    model.merge_adapter()
    with pytest.raises(AdapterBankError, match="not the one active adapter"):
        nearest(model, [batch], Bank.load(bank_dirs["bert"]), adapter_name="second")


def test_a_config_may_make_room_for_directions(bank_dir, batches):
    model = get_peft_model(llama(), eigen(bank_dir, gradient_directions=3))
    augment(model, batches, 3)
    assert all(layer.eig_gradient_in["default"].any() for layer in layers(model).values())


def test_directions_of_the_gradient_alone_make_a_basis(bank_dir, batches, inputs, tmp_path):
    model = get_peft_model(llama(), eigen(bank_dir, k=0, gradient_directions=6))
    augment(model, batches, 6)
    assert all(layer.eig_coef_A["default"].shape == (4, 6) for layer in layers(model).values())
    perturb(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(load(llama(), tmp_path, bank=bank_dir)(**inputs).logits, model.eval()(**inputs).logits)


def test_what_cannot_be_augmented_is_refused(fresh, batches, bank_dir, inputs):
    with pytest.raises(AdapterBankError, match="no batches"):
        augment(fresh, [])
    with pytest.raises(AdapterBankError, match="count=25: no layer has room for more than 24"):
        augment(fresh, batches, 25)
    with pytest.raises(AdapterBankError, match="the model gave no loss"):
        augment(fresh, [inputs], 2)
    augment(fresh, batches, 2)
    with pytest.raises(AdapterBankError, match="has gradient directions already"):
        augment(fresh, batches, 2)
    with pytest.raises(AdapterBankError, match="train='coefficients'"):
        augment(get_peft_model(llama(), eigen(bank_dir, train="core")), batches, 2)
    frozen = get_peft_model(llama(), eigen(bank_dir))
    frozen.set_adapter("default", inference_mode=True)
    with pytest.raises(AdapterBankError, match="nothing to train"):
        augment(frozen, batches, 2)
    with pytest.raises(AdapterBankError, match="no batches"):
        nearest(get_peft_model(llama(), eigen(bank_dir)), [], Bank.load(bank_dir))


def test_the_nearest_member_is_the_one_that_the_task_is_made_of(inputs):
    # the teacher is the base plus a little of one member: to first order only that member lowers the loss
    bank = Bank.fit(adapters_for(llama(), TARGETS["llama"]), k=16, quantize=False)
    teacher = llama()
    for module in bank.index.modules:
        teacher.get_submodule(module.name).weight.data += 0.1 * bank.reconstruct("a3").factors(module.name).update()
    with torch.no_grad():
        target = teacher(**inputs).logits
    model = get_peft_model(llama(), eigen(bank, k=16))
    scores = nearest(
        model, [inputs], bank, loss=lambda m, batch: (m(**batch).logits - target).square().mean(), head_steps=0
    )
    assert next(iter(scores)) == "a3"
    assert scores["a3"] > 0
    assert set(scores) == set(bank.names)
