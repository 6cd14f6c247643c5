"""Starts of training other than the base model: a member of the bank, or a weighted sum of members."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adapterbank.adapters import LoraFactors
from adapterbank.bank import Bank
from adapterbank.bank.shared_basis import SharedBasis
from adapterbank.errors import BankError
from adapterbank.tuner.basis import LayerBasis, ModelBasis
from adapterbank.tuner.layer import EigenLoraLayer
from adapterbank.tuner.live import adapter_layers, base_of, module_names

Parts = list[tuple[float, LoraFactors]]
"""Updates of one module and their weights in a sum."""


def start_at(model: nn.Module, bank: Bank, weights: Mapping[str, float], *, adapter_name: str = "default") -> None:
    """Let an untrained adapter start from a weighted sum of members, e.g. the best of :func:`nearest`.

    Args:
        model: A model with the adapter.
        bank: Its bank.
        weights: By member, e.g. ``{"law": 0.5, "tax": 0.5}``.
        adapter_name: Which adapter.

    Raises:
        UnknownNameError: If the model has no such adapter, or the bank no such member.
    """
    layers = {name: layer.basis_of[adapter_name] for name, layer in adapter_layers(model, adapter_name).items()}
    modules = module_names(model, adapter_name, bank)
    start_from(base_of(model), ModelBasis(bank=bank, layers=layers, modules=modules), adapter_name, weights)


def start_weights(bank: Bank, start: str) -> dict[str, float]:
    """Weights of the members for ``EigenLoraConfig.start``.

    Raises:
        UnknownNameError: If the bank has no such member.
        BankError: If it has none at all.
    """
    if start == "mean":
        if not len(bank):
            raise BankError("the bank has no members to start from")
        return {name: 1 / len(bank) for name in bank.names}
    name = start.removeprefix("member:")
    _ = bank[name]
    return {name: 1.0}


def start_from(model: nn.Module, basis: ModelBasis, adapter_name: str, weights: Mapping[str, float]) -> None:
    """Set an adapter's coefficients to the projection of a weighted sum of members' updates.

    The sum is projected on the shared subspace and cut to the adapter's rank, which is the nearest such update
    (Eckart-Young); directions that the sum leaves free keep their random start.

    Args:
        model: The base model with the adapter's layers in it.
        basis: Of the adapter.
        adapter_name: Which adapter.
        weights: By member.

    Raises:
        BankError: If the adapter has brought its own basis, so that there is no bank.
    """
    if basis.bank is None:
        raise BankError("this adapter brought its own basis and has no bank; load it with bank=")
    parts = _parts(basis.bank, weights)
    for name, layer in model.named_modules():
        if isinstance(layer, EigenLoraLayer) and adapter_name in layer.r:
            _start_layer(layer, adapter_name, parts.get(basis.modules[name], []))


def core_of_members(
    bank: Bank, bases: Mapping[str, SharedBasis], weights: Mapping[str, float]
) -> dict[str, Float[Tensor, "k_out k_in"]]:
    """``U^T dW V^T`` of a weighted sum of members, by module of the bank."""
    parts = _parts(bank, weights)
    return {module: core_of(basis.V, basis.U, parts.get(module, [])) for module, basis in bases.items()}


def core_of(V: Float[Tensor, "k_in d_in"], U: Float[Tensor, "d_out k_out"], parts: Parts) -> Float[Tensor, "_ _"]:
    """``U^T dW V^T`` of a weighted sum of updates."""
    core = torch.zeros(U.shape[1], V.shape[0])
    for weight, factors in parts:
        core += weight * factors.scale * (U.T @ factors.B) @ (factors.A @ V.T)
    return core


def best_pair(core: Float[Tensor, "k_out k_in"], r: int) -> tuple[Float[Tensor, "p k_in"], Float[Tensor, "k_out p"]]:
    """Balanced coefficients of the best update of rank ``r`` (Eckart-Young); fewer pairs where the rank is lower."""
    u, s, vh = torch.linalg.svd(core.double(), full_matrices=False)
    p = min(r, int((s > 1e-7 * s[0].clamp_min(1e-30)).sum()))
    root = s[:p].sqrt()
    return (root[:, None] * vh[:p]).float(), (u[:, :p] * root).float()


def _parts(bank: Bank, weights: Mapping[str, float]) -> dict[str, Parts]:
    found: dict[str, Parts] = {}
    for member, weight in weights.items():
        adapter = bank.reconstruct(member)
        for module in adapter.modules:
            found.setdefault(module, []).append((weight, adapter.factors(module)))
    return found


@torch.no_grad()
def _start_layer(layer: EigenLoraLayer, adapter_name: str, parts: Parts) -> None:
    basis, scale, weights = layer.basis_of[adapter_name], layer.scaling[adapter_name], layer.weights(adapter_name)
    if not parts:
        return
    if basis.fold > 1 or len(basis.V) > basis.k[0]:
        coef_A, coef_B = _of_rows(basis, layer.r[adapter_name], parts)
        _put(weights["eig_coef_A"], coef_A)
        _put(weights["eig_coef_B"], coef_B / scale)
        return
    core = core_of(basis.V, basis.U, parts)
    if "eig_core" in weights:
        _put(weights["eig_core"], core / scale)
        return
    coef_A, coef_B = best_pair(core, layer.r[adapter_name])
    # pairs that the sum leaves free keep their random start: two zeros would never learn
    _put(weights["eig_coef_A"], coef_A)
    _put(weights["eig_coef_B"], coef_B / scale)


def _of_rows(basis: LayerBasis, r: int, parts: Parts) -> tuple[Float[Tensor, "m k_in"], Float[Tensor, "k_out m"]]:
    """Least-squares coefficients of the factors themselves, for flat and centred bases, which have no core."""
    k_in, k_out = basis.k
    coef_A, coef_B = torch.zeros(r // basis.fold, k_in), torch.zeros(k_out, r // basis.fold)
    for weight, factors in parts:
        if factors.rank != r:
            raise BankError(f"a member has rank {factors.rank}; start from it with r={factors.rank}")
        # half of the scale in each factor, as the bank fitted them
        root = abs(factors.scale) ** 0.5
        A = (root * factors.A).reshape(r // basis.fold, -1)
        B_T = (math.copysign(root, factors.scale) * factors.B.T).reshape(r // basis.fold, -1)
        if len(basis.V) > k_in:
            A, B_T = A - basis.V[k_in], B_T - basis.U[:, k_out]
        coef_A += weight * A @ basis.V[:k_in].T
        coef_B += weight * basis.U[:, :k_out].T @ B_T.T
    return coef_A, coef_B


def _put(target: Tensor, value: Tensor) -> None:
    target[: value.shape[0], : value.shape[1]].copy_(value)
