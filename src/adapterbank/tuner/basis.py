"""Bases of a live model's layers: the bank's, matched by module name, with seeded and base-weight directions beside."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapterbank.adapters.names import match_layers
from adapterbank.bank import Bank
from adapterbank.bank.shared_basis import BankBasis, SharedBasis, beside_random
from adapterbank.errors import BankError
from adapterbank.subspace.completion import leading_directions
from adapterbank.subspace.moments import top_eigenpairs
from adapterbank.tuner.config import EigenLoraConfig

_LARGEST_SVD = 1024


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerBasis:
    """What one layer needs; all adapters of one recipe share the tensors."""

    id: str
    """Hash of the recipe: bank, directions, augmentation."""
    V: Float[Tensor, "rows w_in"]
    """``k_in`` orthonormal rows, and the mean row of a centred basis after them."""
    U: Float[Tensor, "w_out columns"]
    """``k_out`` orthonormal columns, and the mean column after them; laid out column by column, which products like."""
    k: tuple[int, int]
    fold: int
    is_edge: bool = False
    """Its components are trained too, in an own copy."""
    is_own: bool = False
    """An adapter brought it along: the tensors here are zeros, the layer's buffers are filled from the file."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "LayerBasis":
        return self  # never changed, so copies of a model may share it


class ModelBasis:
    """Bases of all layers that a config can adapt in one model; each is made when it is asked for.

    Args:
        bank: The bank; none where the adapter brought its basis along.
        modules: Name in the bank by the layer's name in the model.
        make: The basis of a layer.
    """

    def __init__(self, bank: Bank | None, modules: Mapping[str, str], make: Callable[[str], LayerBasis]) -> None:
        self.bank, self.modules = bank, modules
        self._make, self._made = make, dict[str, LayerBasis]()

    def layer(self, name: str) -> LayerBasis:
        """The basis of a layer.

        Raises:
            BankError: If the bank has none for it.
        """
        if name not in self.modules:
            raise BankError(
                f"the bank has no basis for {name}; leave target_modules out to adapt what it has: "
                f"{', '.join(sorted(self.modules)[:3])} and so on"
            )
        if name not in self._made:
            self._made[name] = self._make(name)
        return self._made[name]

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModelBasis":
        return self  # only ever grows, so copies of a model may share it


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a model under the names they have without adapters, also those inside our own."""
    found = {}
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", module)
        parts = name.split(".")
        if parts[-1] != "base_layer" and "modules_to_save" not in parts and sizes_of(base) is not None:
            found[name] = base
    return found


def sizes_of(layer: nn.Module) -> tuple[int, int] | None:
    """``(d_in, d_out)`` of a linear layer, quantised ones too; none for other layers."""
    if isinstance(layer, Conv1D):
        return int(layer.weight.shape[0]), int(layer.nf)
    if isinstance(layer, nn.Linear) or (hasattr(layer, "in_features") and hasattr(layer, "out_features")):
        return int(cast(int, layer.in_features)), int(cast(int, layer.out_features))
    return None


def modules_of(basis: BankBasis, model: nn.Module) -> dict[str, str]:
    """The bank's module for each layer of the model that it has one for.

    Raises:
        BankError: If nothing fits, or a layer has other sizes.
    """
    layers = layers_of(model)
    places = match_layers(basis.modules, layers)
    if not places:
        raise BankError(
            f"the model ({type(model).__name__}) has none of the bank's modules, e.g. {next(iter(basis.modules))}; "
            "is it the base of the bank's adapters?"
        )
    for name, module in places.items():
        found, expected = sizes_of(layers[name]), basis.modules[module].sizes
        if found != expected:
            raise BankError(
                f"{name} maps {found[0] if found else '?'} to {found[1] if found else '?'} features, the bank's "
                f"{module} {expected[0]} to {expected[1]}; load the base of the bank's adapters"
            )
    return places


def model_basis(config: EigenLoraConfig, bank: Bank, basis: BankBasis, model: nn.Module) -> ModelBasis:
    """Bases of all layers that the bank and the model have in common."""
    modules = modules_of(basis, model)
    layers, edges = layers_of(model), edge_names(list(modules), config.edge_layers)

    def make(name: str) -> LayerBasis:
        module = modules[name]
        return layer_basis(
            config, basis.modules[module], basis.fingerprint, module, layers[name], is_edge=name in edges
        )

    return ModelBasis(bank, modules, make)


def layer_basis(
    config: EigenLoraConfig, basis: SharedBasis, fingerprint: str, module: str, layer: nn.Module, *, is_edge: bool
) -> LayerBasis:
    """The bank's basis of one module with the config's augmentation beside it."""
    recipe = [fingerprint, config.random_directions, config.seed, config.base_directions, config.use_mean]
    V, U = basis.V, basis.U
    augmented = config.random_directions or config.base_directions
    if augmented and basis.fold > 1:
        raise BankError("a flat basis can't be augmented; fit the bank by product")
    if config.base_directions:
        weight = _weight(layer)  # (d_out, d_in)
        V = torch.cat([V, _of_weight(weight, config.base_directions, V)])
        U = torch.cat([U, _of_weight(weight.T, config.base_directions, U.T).T], dim=1)
    if config.random_directions:
        V, U = beside_random(V, U, config.random_directions, seed=config.seed, module=module)
    k = int(V.shape[0]), int(U.shape[1])
    if config.use_mean:
        if basis.mean_in is None or basis.mean_out is None:
            raise BankError("use_mean needs a bank that was fitted with mean='affine'; this one has no mean")
        V, U = torch.cat([V, basis.mean_in[None]]), torch.cat([U, basis.mean_out[:, None]], dim=1)
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]
    return LayerBasis(id=digest, V=V.contiguous(), U=U.T.contiguous().T, k=k, fold=basis.fold, is_edge=is_edge)


def edge_names(names: list[str], count: int) -> set[str]:
    """Those of ``names`` that lie in the first or last ``count`` layers of their stack."""
    if not count:
        return set()
    stacks: dict[str, dict[int, list[str]]] = {}
    for name in names:
        found = re.match(r"(?:(.*?)\.)?(\d+)\.", name)
        if found:
            stacks.setdefault(found[1] or "", {}).setdefault(int(found[2]), []).append(name)
    edges: set[str] = set()
    for stack in stacks.values():
        order = sorted(stack)
        for index in {*order[:count], *order[-count:]}:
            edges.update(stack[index])
    return edges


def _weight(layer: nn.Module) -> Float[Tensor, "d_out d_in"]:
    # torchao's backend wants to know how to quantise again, which nobody does here
    backend = resolve_quantization_backend(layer, get_apply_tensor_subclass=lambda: None)
    found: Any = layer.weight if backend is None else backend.get_base_weight(layer)
    weight: Tensor = found.detach().float().cpu()
    return weight.T if isinstance(layer, Conv1D) else weight


def _of_weight(weight: Float[Tensor, "m d"], count: int, against: Float[Tensor, "k d"]) -> Float[Tensor, "count d"]:
    if min(weight.shape) > _LARGEST_SVD:
        # the exact SVD of a 4096-wide layer takes a minute; the seeded range finder a second
        left = weight - weight @ against.T @ against
        _, vectors = top_eigenpairs(left.T @ left, count)
        weight = vectors.T.float()
    found = leading_directions(weight, count, against)
    if len(found) < count:
        raise BankError(f"the base weight has only {len(found)} directions beside the bank's, not {count}")
    return found
