"""Any trainer as a SHiRA trainer: gradients are masked as soon as they're accumulated (SHiRA, 3.3 and appendix D).

Dense gradients and dense optimiser states are the price; ``adapterbank.shira.tuner`` has neither.
"""

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from adapterbank.errors import AdapterBankError
from adapterbank.shira.delta import SparseDelta, gathered
from adapterbank.shira.fingerprint import fingerprint_of


class MaskedGradients:
    """Masks that are on some parameters' gradients; made by :func:`mask_gradients`.

    As a context manager it takes them off at the end.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], positions: Mapping[str, Tensor]) -> None:
        self._parameters, self._positions = parameters, positions
        self._base = {name: gathered(parameter, positions[name]) for name, parameter in parameters.items()}
        self._fingerprints = {name: fingerprint_of(gathered(p, positions[name])) for name, p in parameters.items()}
        self._handles: list[Any] = []
        for name, parameter in parameters.items():
            untyped: Any = parameter  # torch's method has no types
            self._handles.append(untyped.register_post_accumulate_grad_hook(_hook(positions[name])))

    def delta(self, name: str = "adapter", **fields: Any) -> SparseDelta:
        """What was learned since: the parameters' values at the positions, less those at the beginning.

        Args:
            name: Of the adapter.
            fields: As in ``SparseDelta.from_tensors``.
        """
        tensors = {
            key: (positions, gathered(self._parameters[key], positions).float() - self._base[key].float())
            for key, positions in self._positions.items()
        }
        shapes = {key: (int(p.shape[0]), int(p.shape[1])) for key, p in self._parameters.items()}
        return SparseDelta.from_tensors(tensors, shapes, name=name, fingerprints=self._fingerprints, **fields)

    def remove(self) -> None:
        """Take the masks off; the parameters stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> "MaskedGradients":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def mask_gradients(
    model: nn.Module, positions: Mapping[str, Int[Tensor, " nnz"]], optimizer: torch.optim.Optimizer
) -> MaskedGradients:
    """Train only some weights of a model, with any optimiser that moves what has a gradient.

    Args:
        model: Whose parameters are trained in place.
        positions: Flat positions by parameter name, from ``adapterbank.shira.masks``.
        optimizer: That trains them.

    Raises:
        AdapterBankError: If a parameter is missing, frozen or no dense matrix, positions lie outside of it, or the
            optimiser doesn't train it, or decays it: AdamW's decay moves weights that have no gradient too.
    """
    named, decays = dict(model.named_parameters()), _decays(optimizer)
    parameters = {}
    for name in positions:
        if name not in named:
            raise AdapterBankError(f"the model has no parameter {name}")
        if named[name].ndim != 2:
            raise AdapterBankError(
                f"{name} is {tuple(named[name].shape)}: sparse adapters change matrices; leave it out of the positions"
            )
        _check_places(name, named[name], positions[name])
        if not named[name].requires_grad:
            raise AdapterBankError(f"{name} is frozen; set requires_grad_(True) on what is to be trained")
        if named[name] not in decays:
            raise AdapterBankError(f"the optimiser doesn't train {name}; give the one that does")
        if decays[named[name]]:
            raise AdapterBankError(
                f"the optimiser has weight_decay={decays[named[name]]:g} for {name}, which moves all of its weights, "
                "with or without a gradient; put it into a group with weight_decay=0"
            )
        parameters[name] = named[name]
    return MaskedGradients(parameters, dict(positions))


def _check_places(name: str, parameter: nn.Parameter, positions: Tensor) -> None:
    if not parameter.is_contiguous():
        raise AdapterBankError(
            f"{name} has strides {parameter.stride()}: it isn't stored row by row; make it contiguous"
        )
    total = parameter.numel()
    if len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) < total:
        raise AdapterBankError(
            f"{name}: positions reach from {int(positions.min())} to {int(positions.max())}, it has {total} weights; "
            "choose them for this layer"
        )


def _decays(optimizer: torch.optim.Optimizer) -> dict[Tensor, float]:
    return {
        parameter: float(group.get("weight_decay") or 0)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def _hook(positions: Tensor) -> Any:
    def mask(parameter: Tensor) -> None:  # returns nothing: torch refuses a result
        gradient = parameter.grad
        if gradient is not None:
            flat, index = gradient.view(-1), positions.to(gradient.device, torch.int64)
            kept = flat.index_select(0, index)
            flat.zero_().scatter_(0, index, kept)

    return mask
