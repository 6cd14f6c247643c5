import pytest
import torch
from peft import LoraConfig, get_peft_model

from adapterbank.adapters import LoraAdapter
from adapterbank.bank import Bank
from adapterbank.errors import AdapterBankError, BankError, UnknownNameError
from adapterbank.tuner import init_lora, start_at
from adapterbank.tuner.layer import EigenLoraLayer
from adapterbank.tuner.starts import best_pair
from tiny_models import TARGETS, adapters_for, eigen, llama


@pytest.fixture(scope="module")
def full():
    """A bank whose subspace holds all its members: five of rank 4 on 20 directions."""
    return Bank.fit(adapters_for(llama(), TARGETS["llama"]), k=16, quantize=False)


def deltas(model, adapter_name="default"):
    return {
        name: layer.get_delta_weight(adapter_name).detach()
        for name, layer in model.base_model.model.named_modules()
        if isinstance(layer, EigenLoraLayer)
    }


def projected(bank, weights, k):
    """What a weighted sum of members leaves in the subspace, dense."""
    basis, found = bank.basis(k).modules, {}
    for module in basis:
        dW = sum(w * bank.reconstruct(name).factors(module).update() for name, w in weights.items())
        V, U = basis[module].V, basis[module].U
        found[module] = U @ (U.T @ dW @ V.T) @ V
    return found


def truncated(dW, r):
    U, S, Vh = torch.linalg.svd(dW)
    return U[:, :r] * S[:r] @ Vh[:r]


@pytest.mark.parametrize("fields", [{}, {"lora_alpha": 16.0}, {"train": "core"}], ids=["pair", "scaled", "core"])
def test_a_member_is_the_start_that_it_projects_to(full, fields):
    model = get_peft_model(llama(), eigen(full, k=16, start="member:a1", **fields))
    for name, expected in projected(full, {"a1": 1.0}, 16).items():
        torch.testing.assert_close(deltas(model)[name], expected, rtol=1e-4, atol=1e-5)


def test_the_mean_is_that_of_the_members_cut_to_the_rank(full):
    model = get_peft_model(llama(), eigen(full, k=16, start="mean"))
    for name, expected in projected(full, dict.fromkeys(full.names, 0.2), 16).items():
        torch.testing.assert_close(deltas(model)[name], truncated(expected, 4), rtol=1e-3, atol=1e-5)


def test_any_sum_of_members_can_be_the_start(full):
    model = get_peft_model(llama(), eigen(full, r=8, k=16))
    start_at(model, full, {"a0": 0.3, "a2": -0.5})
    for name, expected in projected(full, {"a0": 0.3, "a2": -0.5}, 16).items():
        torch.testing.assert_close(deltas(model)[name], expected, rtol=1e-3, atol=1e-5)


def test_free_pairs_keep_their_random_rows(full):
    # a rank above the member's: pairs of two zeros would never get a gradient
    model = get_peft_model(llama(), eigen(full, r=6, k=16, start="member:a0"))
    layer = next(m for m in model.modules() if isinstance(m, EigenLoraLayer))
    assert (layer.eig_coef_A["default"][4:].norm(dim=1) > 0).all()
    assert not layer.eig_coef_B["default"][:, 4:].any()


def test_best_pairs_are_balanced_and_best():
    core = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    coef_A, coef_B = best_pair(core, 3)
    torch.testing.assert_close(coef_B @ coef_A, truncated(core, 3), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(coef_A @ coef_A.T, coef_B.T @ coef_B, rtol=1e-4, atol=1e-5)


def test_a_start_is_over_once_it_is_saved(full, tmp_path):
    model = get_peft_model(llama(), eigen(full, k=16, start="member:a1"))
    assert model.peft_config["default"].to_dict()["start"] == "base"


def test_strangers_are_no_start(full):
    with pytest.raises(UnknownNameError, match="no member 'nobody'"):
        get_peft_model(llama(), eigen(full, k=16, start="member:nobody"))
    with pytest.raises(AdapterBankError, match="start='somewhere' is unknown"):
        eigen(full, start="somewhere")


# --- the papers' banks ------------------------------------------------------------------------------------------------


def paper_bank(**options):
    return Bank.fit(adapters_for(llama(), TARGETS["llama"]), quantize=False, **options)


def test_a_centred_basis_reconstructs_its_members_exactly_at_full_rank():
    # 20 stacked rows, less one for the mean: the span is affine (spec.md E22)
    bank = paper_bank(method="eigenlora", k=15)
    model = get_peft_model(llama(), eigen(bank, k=15, use_mean=True, start="member:a3"))
    for name, delta in deltas(model).items():
        expected = bank.reconstruct("a3").factors(name).update()
        torch.testing.assert_close(delta, expected, rtol=1e-3, atol=1e-4)


def test_a_scale_multiplies_the_mean_as_well():
    # B' = scale (U coef_B + mean): fitted by least squares to a member's B
    bank = paper_bank(method="eigenlora", k=15)
    model = get_peft_model(llama(), eigen(bank, k=15, use_mean=True, start="member:a3", lora_alpha=8.0))
    for name, delta in deltas(model).items():
        factors, basis = bank.reconstruct("a3").factors(name), bank.basis(15).modules[name]
        rows = factors.B.T / 2 - basis.mean_out
        B = 2 * (rows @ basis.U @ basis.U.T + basis.mean_out).T
        torch.testing.assert_close(delta, B @ factors.A, rtol=1e-3, atol=1e-4)


def test_frozen_coefficients_start_at_a_member_and_nothing_else(full):
    model = get_peft_model(llama(), eigen(full, r=6, k=16, train="head", start="member:a1"))
    for name, expected in projected(full, {"a1": 1.0}, 16).items():
        torch.testing.assert_close(deltas(model)[name], expected, rtol=1e-4, atol=1e-5)


def test_with_all_coefficients_zero_the_update_is_of_the_mean_rows():
    bank = paper_bank(method="eigenlora", k=8)
    model = get_peft_model(llama(), eigen(bank, k=8, use_mean=True, start="random"))
    for layer in model.modules():
        if isinstance(layer, EigenLoraLayer):
            layer.eig_coef_A["default"].data.zero_()
            layer.eig_coef_B["default"].data.zero_()
    for name, basis in bank.basis(8).modules.items():
        expected = 4 * torch.outer(basis.mean_out, basis.mean_in)
        torch.testing.assert_close(deltas(model)[name], expected, rtol=1e-4, atol=1e-6)


def test_means_need_a_bank_with_means_and_another_start(full):
    with pytest.raises(AdapterBankError, match="with use_mean, choose"):
        eigen(full, use_mean=True)
    with pytest.raises(BankError, match="this one has no mean"):
        get_peft_model(llama(), eigen(full, k=16, use_mean=True, start="random"))


def test_a_flat_bank_mixes_its_experts():
    # dW is bilinear: sum_k b_k expert_k^T times sum_k a_k expert_k (spec.md E49)
    bank = paper_bank(method="flat", k=3)
    model = get_peft_model(llama(), eigen(bank, k=3, start="random"))
    for name, basis in bank.basis(3).modules.items():
        layer = model.base_model.model.get_submodule(name)
        a, b = layer.eig_coef_A["default"][0], layer.eig_coef_B["default"][:, 0]
        A = torch.einsum("k,krd->rd", a, basis.V.view(3, 4, -1))
        B_T = torch.einsum("k,krd->rd", b, basis.U.T.reshape(3, 4, -1))
        torch.testing.assert_close(layer.get_delta_weight("default"), B_T.T @ A, rtol=1e-4, atol=1e-6)
        x = torch.randn(30, A.shape[1])
        torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ A.T @ B_T, rtol=1e-4, atol=1e-5)
    with pytest.raises(AdapterBankError, match="factors of rank 4: give r=4 and no core"):
        get_peft_model(llama(), eigen(bank, k=3, r=2))


def test_a_flat_bank_starts_from_a_member():
    bank = paper_bank(method="flat", k=4, mean="none")
    model = get_peft_model(llama(), eigen(bank, k=4, start="member:a2"))
    layer = model.base_model.model.get_submodule(bank.index.modules[0].name)
    factors, basis = bank.reconstruct("a2").factors(bank.index.modules[0].name), layer.basis_of["default"]
    A, _ = layer.factors("default")
    flat = factors.A.reshape(1, -1)
    torch.testing.assert_close(A, (flat @ basis.V.T @ basis.V).view_as(A), rtol=1e-3, atol=1e-4)


# --- a plain LoRA that starts in the bank -----------------------------------------------------------------------------


@pytest.fixture
def lora():
    return get_peft_model(llama(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))


def lora_deltas(model):
    return {n: m.get_delta_weight("default") for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}


def test_a_lora_starts_as_the_base_model_with_rows_in_the_subspace(full, lora):
    init_lora(lora, full, k=8)
    basis = full.basis(8).modules
    for name, module in lora.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            A, V = module.lora_A["default"].weight, basis[name].V
            torch.testing.assert_close(A @ V.T @ V, A.detach(), rtol=1e-4, atol=1e-5)
            assert not module.lora_B["default"].weight.any()
            assert A.requires_grad


def test_a_lora_starts_from_a_member(full, lora):
    init_lora(lora, full, start="member:a1", k=16)
    for name, expected in projected(full, {"a1": 1.0}, 16).items():
        torch.testing.assert_close(lora_deltas(lora)[name], expected, rtol=1e-4, atol=1e-5)


def test_a_lora_starts_at_random_inside(full, lora):
    init_lora(lora, full, start="random", k=8)
    for name, delta in lora_deltas(lora).items():
        basis = full.basis(8).modules[name]
        torch.testing.assert_close(
            basis.U @ basis.U.T @ delta @ basis.V.T @ basis.V, delta.detach(), rtol=1e-3, atol=1e-4
        )
        assert delta.norm() > 0


def test_a_lora_elsewhere_is_refused(full):
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["k_proj"]))
    with pytest.raises(AdapterBankError, match=r"the bank has no basis for model\.layers\.0\.self_attn\.k_proj"):
        init_lora(model, full)
    with pytest.raises(UnknownNameError, match="no LoRA 'other'"):
        init_lora(model, full, adapter_name="other")


def test_members_that_miss_a_module_add_nothing_there(lora):
    whole, part = adapters_for(llama(), TARGETS["llama"])[:2]
    first = sorted(whole.modules)[0]
    less = LoraAdapter.from_factors("part", {m: part.factors(m) for m in part.modules if m != first}, base="tiny/base")
    bank = Bank.fit([whole, less], k=4, quantize=False)
    model = get_peft_model(llama(), eigen(bank, k=4, start="member:part"))
    assert not deltas(model)[first].any()
