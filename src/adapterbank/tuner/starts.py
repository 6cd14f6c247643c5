"""Starts of training other than the base model: a member of the bank, or a weighted sum of members."""

import math
from collections.abc import Mapping
from os import PathLike

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adapterbank.adapters import LoraFactors
from adapterbank.bank import Bank
from adapterbank.bank.shared_basis import SharedBasis
from adapterbank.errors import BankError
from adapterbank.tuner.finding import as_bank
from adapterbank.tuner.layer import EigenLoraLayer
from adapterbank.tuner.live import base_of, module_names

Parts = list[tuple[float, LoraFactors]]
"""Updates of one module and their weights in a sum."""


def start_at(
    model: nn.Module, bank: Bank | str | PathLike[str], weights: Mapping[str, float], *, adapter_name: str = "default"
) -> None:
    """Let an untrained adapter start from a weighted sum of members, e.g. the best of :func:`nearest`.

    Args:
        model: A model with the adapter.
        bank: Its bank.
        weights: By member, e.g. ``{"law": 0.5, "tax": 0.5}``.
        adapter_name: Which adapter.

    Raises:
        UnknownNameError: If the model has no such adapter, or the bank no such member.
    """
    bank = as_bank(bank)
    start_from(base_of(model), bank, module_names(model, adapter_name, bank), adapter_name, weights)


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


def start_from(
    model: nn.Module, bank: Bank, modules: Mapping[str, str], adapter_name: str, weights: Mapping[str, float]
) -> None:
    """Set an adapter's coefficients to the projection of a weighted sum of members' updates.

    The sum is projected on the shared subspace and cut to the adapter's rank, which is the nearest such update
    (Eckart-Young); directions that the sum leaves free keep their random start.

    Args:
        model: The base model with the adapter's layers in it.
        bank: The adapter's bank.
        modules: The bank's module of each layer.
        adapter_name: Which adapter.
        weights: By member.

    Raises:
        UnknownNameError: If the bank has no such member.
    """
    parts = _parts(bank, weights)
    for name, layer in model.named_modules():
        if isinstance(layer, EigenLoraLayer) and adapter_name in layer.r:
            _start_layer(layer, adapter_name, parts.get(modules[name], []))


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
    scale, weights = layer.scaling[adapter_name], layer.weights(adapter_name)
    V, U = layer.basis(adapter_name)
    if not parts:
        return
    if "eig_core" in weights:
        weights["eig_core"].copy_(core_of(V, U, parts) / scale)
        return
    if layer.basis_of[adapter_name].fold > 1 or len(layer.shared_V[layer.basis_of[adapter_name].id]) > len(V):
        coef_A, coef_B = _of_rows(layer, adapter_name, parts)
    else:
        coef_A, coef_B = best_pair(core_of(V, U, parts), layer.r[adapter_name])
        coef_B = coef_B / scale
    # pairs that the sum leaves free keep their random rows: two zeros would never learn
    weights["eig_coef_B"].zero_()
    _put(weights["eig_coef_A"], coef_A)
    _put(weights["eig_coef_B"], coef_B)


def _of_rows(
    layer: EigenLoraLayer, adapter_name: str, parts: Parts
) -> tuple[Float[Tensor, "m k_in"], Float[Tensor, "k_out m"]]:
    """Least-squares coefficients of the factors themselves, for flat and centred bases, which have no core."""
    basis, r, scale = layer.basis_of[adapter_name], layer.r[adapter_name], layer.scaling[adapter_name]
    (V, U), rows = layer.basis(adapter_name), r // basis.fold
    mean_in = layer.shared_V[basis.id][len(V) :].float().cpu()  # one row or none
    mean_out = layer.shared_U[basis.id][:, U.shape[1] :].T.float().cpu()
    coef_A, coef_B = torch.zeros(rows, len(V)), torch.zeros(U.shape[1], rows)
    for weight, factors in parts:
        if factors.rank != r:
            raise BankError(f"a member has rank {factors.rank}; start from it with r={factors.rank}")
        # half of the scale in each factor, as the bank fitted them
        root = abs(factors.scale) ** 0.5
        A = (root * factors.A).reshape(rows, -1)
        # the adapter's own scale multiplies the mean too
        B_T = (math.copysign(root, factors.scale) / scale * factors.B.T).reshape(rows, -1)
        coef_A += weight * (A - mean_in.sum(0)) @ V.T
        coef_B += weight * U.T @ (B_T - mean_out.sum(0)).T
    return coef_A, coef_B


def _put(target: Tensor, value: Tensor) -> None:
    target[: value.shape[0], : value.shape[1]].copy_(value)
