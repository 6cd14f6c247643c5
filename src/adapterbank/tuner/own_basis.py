"""Adapters that bring their basis along (``save_basis=True``): its shapes are in the config, its values in the file."""

import torch
from torch import nn

from adapterbank.errors import AdapterBankError
from adapterbank.tuner.basis import LayerBasis, ModelBasis, edge_names, layers_of, sizes_of
from adapterbank.tuner.config import EigenLoraConfig
from adapterbank.tuner.layer import EigenLoraLayer


def shapes_of(model: nn.Module, adapter_name: str) -> dict[str, list[int]]:
    """``[k_in, k_out, fold, rows of V, columns of U]`` and the id of each layer's basis."""
    return {
        f"{name}:{basis.id}": [*basis.k, basis.fold, len(basis.V), basis.U.shape[1]]
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
    shapes = config.basis_shapes or {}
    edges = edge_names([key.partition(":")[0] for key in shapes], config.edge_layers)
    for key, (k_in, k_out, fold, rows, columns) in shapes.items():
        name, _, digest = key.partition(":")
        sizes = sizes_of(layers[name]) if name in layers else None
        if sizes is None:
            raise AdapterBankError(
                f"the model has no linear layer {name}; load the base that the adapter was trained on"
            )
        found[name] = LayerBasis(
            id=digest, V=torch.zeros(rows, fold * sizes[0]), U=torch.zeros(fold * sizes[1], columns),
            k=(k_in, k_out), fold=fold, is_edge=name in edges,
        )  # fmt: skip
    return ModelBasis(bank=None, layers=found, modules={name: name for name in found})
