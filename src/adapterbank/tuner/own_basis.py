"""Adapters that bring their basis along (``save_basis=True``): its shapes are in the config, its values in the file."""

import torch
from torch import nn

from adapterbank.errors import AdapterBankError
from adapterbank.tuner.basis import LayerBasis, ModelBasis, layers_of, sizes_of
from adapterbank.tuner.config import EigenLoraConfig
from adapterbank.tuner.layer import EigenLoraLayer


def shapes_of(model: nn.Module, adapter_name: str) -> dict[str, list[int]]:
    """``EigenLoraConfig.basis_shapes`` of an adapter."""
    return {
        f"{name}:{basis.id}": [*basis.k, basis.fold, len(basis.V), basis.U.shape[1], int(basis.is_edge)]
        for name, layer in model.named_modules()
        if isinstance(layer, EigenLoraLayer) and adapter_name in layer.r
        for basis in (layer.basis_of[adapter_name],)
    }


def basis_from_shapes(config: EigenLoraConfig, model: nn.Module) -> ModelBasis:
    """Bases of zeros with the right sizes, which the adapter's file then fills.

    Raises:
        AdapterBankError: If the model lacks a layer.
    """
    layers, found = layers_of(model), {}
    for key, (k_in, k_out, fold, rows, columns, is_edge) in (config.basis_shapes or {}).items():
        name, _, digest = key.partition(":")
        sizes = sizes_of(layers[name]) if name in layers else None
        if sizes is None:
            raise AdapterBankError(f"the model has no linear layer {name}; load the base of the adapter")
        found[name] = LayerBasis(
            id=digest, V=torch.zeros(rows, fold * sizes[0]), U=torch.zeros(fold * sizes[1], columns),
            k=(k_in, k_out), fold=fold, is_edge=bool(is_edge), is_own=True,
        )  # fmt: skip
    return ModelBasis(None, {name: name for name in found}, found.__getitem__)
