"""Masks by the task's gradient: which weights matter, seen on a few batches."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from adapterbank.calibration import Loss, default_loss, evaluating, fitted_head, held_batches
from adapterbank.errors import AdapterBankError
from adapterbank.shira import masks
from adapterbank.shira.tuner.layer import SparseLayer
from adapterbank.shira.tuner.model import layers_of, note

SUMS = ("abs_of_sum", "sum_of_abs")


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    adapter_name: str = "default",
    loss: Loss = default_loss,
    how: str = "abs_of_sum",
    most_batches: int = 8,
    layers_at_once: int | None = None,
    head_steps: int = 20,
    head_lr: float = 1e-2,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Choose the positions of an untrained adapter whose mask is ``grad`` or ``snip``; nothing else is changed.

    The gradient is that of the base model alone, without any adapter, its head fitted for a few steps and put back (a
    zero head has none). Weights, modes, random state, flags and ``.grad`` are left as found; an optimiser may have the
    values already. The adapter's config then says how it was done.

    Args:
        model: A PEFT model.
        batches: Of a dataloader: mappings that the model takes, or whatever ``loss`` takes.
        adapter_name: Which adapter.
        loss: Loss of a batch.
        how: ``abs_of_sum``: magnitude of the summed gradient (the paper leaves it open); ``sum_of_abs``: sum of the
            batches' magnitudes.
        most_batches: No more are read.
        layers_at_once: So many dense gradients in memory at a time, at the cost of as many more passes; by default all.
        head_steps: Steps of AdamW on the modules in ``modules_to_save``, for the while of this call.
        head_lr: Their learning rate.
        progress: Called with ``(stage, done, total)`` after each batch.

    Raises:
        AdapterBankError: If the adapter's mask needs no gradient, it isn't active or was trained, an adapter is merged,
            there are no batches, or the loss has no gradient in one of the layers.
    """
    layers, config = _ready(model, adapter_name), _config_of(model, adapter_name)
    if how not in SUMS:
        raise AdapterBankError(f"how={how!r} is unknown; choose from {', '.join(SUMS)}")
    held, found = held_batches(batches, most_batches), dict[str, Tensor]()
    with (
        torch.random.fork_rng(),
        _base_alone(model),
        fitted_head(model, adapter_name, held, loss, head_steps, head_lr),
    ):
        chunks = list(_chunks(list(layers), layers_at_once or len(layers)))
        for i, names in enumerate(chunks):
            weights = [layers[name].get_base_layer().weight for name in names]
            passes = _told(held, progress, i * len(held), len(chunks) * len(held))
            sums = _summed(model, weights, passes, loss, how)
            for name, weight, gradient in zip(names, weights, sums, strict=True):
                if not gradient.any():
                    raise AdapterBankError(
                        f"the loss has no gradient in {name}, so no weight of it comes first: leave it out of "
                        "target_modules if the loss doesn't reach it; a head of zeros belongs into modules_to_save"
                    )
                if config.mask == "grad":
                    found[name] = masks.grad(gradient, config.density, part=config.part)
                else:
                    found[name] = masks.snip(weight, gradient, config.density, part=config.part)
    for name, layer in layers.items():  # all or none
        layer.put_in(adapter_name, found[name])
    config.calibration = {"how": how, "batches": len(held)}
    note(config, model, adapter_name)


def _ready(model: nn.Module, adapter_name: str) -> dict[str, SparseLayer]:
    layers = layers_of(model, adapter_name)
    if not layers:
        raise AdapterBankError(f"the model has no sparse adapter {adapter_name!r}")
    config = _config_of(model, adapter_name)
    if config.mask not in masks.GRADIENT_KINDS:
        raise AdapterBankError(f"adapter {adapter_name!r} has its positions: mask={config.mask!r} needs no gradient")
    if any(layer.values(adapter_name).any() for layer in layers.values()):
        raise AdapterBankError(f"adapter {adapter_name!r} was trained; calibrate a fresh one")
    if any(adapter_name not in layer.active_adapters for layer in layers.values()):
        raise AdapterBankError(
            f"adapter {adapter_name!r} isn't active, so the loss is that of another one's head; call "
            f"model.set_adapter({adapter_name!r}) first"
        )
    if merged := sorted({name for layer in _tuned(model) for name in layer.merged_adapters}):
        raise AdapterBankError(f"{', '.join(merged)} is merged into the base model; unmerge it first")
    return layers


def _config_of(model: Any, adapter_name: str) -> Any:
    return model.peft_config[adapter_name]


def _chunks(names: list[str], size: int) -> Iterator[list[str]]:
    rest = iter(names)
    while chunk := list(islice(rest, size)):
        yield chunk


def _told(batches: list[Any], progress: Callable[[str, int, int], None] | None, done: int, total: int) -> Iterator[Any]:
    """The batches; each one is told when it is done."""
    for number, batch in enumerate(batches, start=done + 1):
        yield batch
        if progress:
            progress("sum gradients", number, total)


def _summed(
    model: nn.Module,
    weights: list[nn.Parameter],
    batches: Iterable[Any],
    loss: Loss,
    how: str,
) -> list[Float[Tensor, "_ _"]]:
    """Gradients of some base weights over all batches, in float32."""
    sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    with evaluating(model), _asking_for(model, weights):
        for batch in batches:
            # not backward(): nobody's .grad changes
            gradients = torch.autograd.grad(loss(model, batch), weights, allow_unused=True)
            for total, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    total += gradient.float().abs() if how == "sum_of_abs" else gradient.float()
    return sums


def _tuned(model: nn.Module) -> list[BaseTunerLayer]:
    return [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]


@contextmanager
def _base_alone(model: nn.Module) -> Iterator[None]:
    """The base layers themselves, whose weights autograd knows, whatever adapters are active where."""
    layers = _tuned(model)
    flags = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, flag in zip(layers, flags, strict=True):
            layer._disable_adapters = flag


@contextmanager
def _asking_for(model: nn.Module, weights: list[nn.Parameter]) -> Iterator[None]:
    """Gradients of these weights and of nothing else."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in flags:
        parameter.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
