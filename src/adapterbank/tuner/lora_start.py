"""An ordinary LoRA whose factors start inside the bank's subspace (the paper's LoRA-init, table 11)."""

from os import PathLike
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from adapterbank.adapters.names import match_layers
from adapterbank.bank import Bank
from adapterbank.errors import AdapterBankError, UnknownNameError
from adapterbank.tuner.finding import as_bank
from adapterbank.tuner.live import base_of
from adapterbank.tuner.starts import best_pair, core_of_members, start_weights


@torch.no_grad()
def init_lora(
    model: nn.Module,
    bank: Bank | str | PathLike[str],
    *,
    start: str = "base",
    k: int | None = None,
    adapter_name: str = "default",
) -> None:
    """Set the factors of a plain PEFT LoRA to ones inside the bank's subspace; it is then trained as any LoRA.

    Args:
        model: A PEFT model with the LoRA.
        bank: A bank of the same base model.
        start: ``base``: ``A`` random in the subspace, ``B = 0``; ``random``: both random; ``mean`` or
            ``member:NAME``: the projection of those.
        k: Directions a side, as in :meth:`adapterbank.Bank.basis`.
        adapter_name: Which adapter.

    Raises:
        UnknownNameError: If the model has no such LoRA.
        AdapterBankError: If the bank has nothing for one of its layers.
    """
    layers: dict[str, Any] = {
        name: module
        for name, module in base_of(model).named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A
    }
    if not layers:
        raise UnknownNameError(f"the model has no LoRA {adapter_name!r}")
    bank = as_bank(bank)
    basis = bank.basis(k)
    modules = match_layers(basis.modules, layers)
    if lacking := sorted(layers.keys() - modules.keys()):
        raise AdapterBankError(f"the bank has no basis for {lacking[0]}; target the modules that it has")
    weights = {} if start in ("base", "random") else start_weights(bank, start)
    cores = core_of_members(bank, {m: basis.modules[m] for m in modules.values()}, weights)
    for name, layer in layers.items():
        own = basis.modules[modules[name]]
        r, scale, (k_in, k_out) = layer.r[adapter_name], layer.scaling[adapter_name], own.k
        if own.fold > 1:
            raise AdapterBankError("flat banks have no subspace of rows; fit the bank by product")
        coef_A, coef_B = torch.randn(r, k_in) / (3 * k_in) ** 0.5, torch.zeros(k_out, r)
        if start == "random":
            coef_A, coef_B = torch.rand(r, k_in) - 0.5, torch.rand(k_out, r) - 0.5
        elif weights:
            left, right = best_pair(cores[modules[name]], r)
            coef_A[: len(left)], coef_B[:, : len(left)] = left, right / scale
        A, B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        A.copy_(coef_A @ own.V)
        B.copy_(own.U @ coef_B)
