"""Adapters in live models: their layers, configs and names, whatever the model is wrapped in."""

from typing import Any

from torch import nn

from adapterbank.adapters import LoraAdapter, LoraFactors
from adapterbank.adapters.live import read_model
from adapterbank.adapters.names import match_layers
from adapterbank.bank import Bank
from adapterbank.errors import AdapterBankError, UnknownNameError
from adapterbank.tuner.config import EigenLoraConfig
from adapterbank.tuner.layer import EigenLoraLayer


def base_of(model: Any) -> nn.Module:
    """The model under a ``PeftModel``; a model with native adapters itself."""
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base


def adapter_layers(model: nn.Module, adapter_name: str = "default") -> dict[str, EigenLoraLayer]:
    """Layers that have an adapter, by their names in the base model.

    Raises:
        UnknownNameError: If none has.
    """
    found = {n: m for n, m in base_of(model).named_modules() if isinstance(m, EigenLoraLayer) and adapter_name in m.r}
    if not found:
        raise UnknownNameError(f"the model has no adapter {adapter_name!r} that was made from a bank")
    return found


def adapter_config(model: Any, adapter_name: str = "default") -> EigenLoraConfig:
    """The config of an adapter.

    Raises:
        AdapterBankError: If it is another method's.
    """
    config = model.peft_config[adapter_name]
    if not isinstance(config, EigenLoraConfig):
        raise AdapterBankError(f"adapter {adapter_name!r} is a {type(config).__name__}, expected one trained in a bank")
    return config


def module_names(model: nn.Module, adapter_name: str, bank: Bank) -> dict[str, str]:
    """The bank's module of each layer of an adapter."""
    return match_layers([module.name for module in bank.index.modules], adapter_layers(model, adapter_name))


def export_lora(model: Any, adapter_name: str = "default", *, name: str | None = None) -> LoraAdapter:
    """The adapter as an ordinary LoRA, exactly: ``A' = coef_A @ V``, ``B' = scale * U @ coef_B``, rank ``r`` plus the
    free rank; with its task head.

    Args:
        model: A PEFT model, or one with native adapters.
        adapter_name: Which adapter.
        name: Name of the result; by default the adapter's.

    Raises:
        UnknownNameError: If the model has no such adapter.
    """
    layers, config = adapter_layers(model, adapter_name), adapter_config(model, adapter_name)
    factors = {}
    for module, layer in layers.items():
        A, B = (factor.detach().float().cpu() for factor in layer.factors(adapter_name))
        factors[module] = LoraFactors(A=A.contiguous(), B=B.contiguous(), scale=1.0)
    _, tensors = read_model(model, adapter_name)
    heads = {
        key.removeprefix("base_model.model."): value
        for key, value in tensors.items()
        if not any(part.startswith(("eig_", "shared_")) for part in key.split("."))
    }
    kept = {
        "task_type": config.task_type,
        "auto_mapping": config.auto_mapping,
        "revision": config.revision,
        "modules_to_save": sorted(config.modules_to_save or []) or None,
        # PEFT transposes by this flag, and warns where it is missing for a Conv1D
        "fan_in_fan_out": any(layer.is_conv1d for layer in layers.values()),
    }
    base = config.base_model_name_or_path
    return LoraAdapter.from_factors(name or adapter_name, factors, base=base, config=kept, extras=heads)
