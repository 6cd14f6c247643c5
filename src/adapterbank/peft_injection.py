"""Taking back an adapter that couldn't be put into a model."""

import warnings
from typing import Any

from torch import nn

from adapterbank.peft_scaling import ScaledAdapters


def take_back(model: nn.Module, adapter_name: str) -> None:
    """Undo an injection that failed; layers that were wrapped for it alone are bare again.

    Half an adapter would be part of the next one of its name.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, ScaledAdapters) and adapter_name in module.scaling:
            layer: Any = module
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about the adapter that is now active, which is as before
                active = [other for other in layer.active_adapters if other != adapter_name]
                layer.delete_adapter(adapter_name)
                layer._active_adapter = active or layer.active_adapters
            if not layer.scaling:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, layer.base_layer)
