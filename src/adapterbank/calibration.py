"""Looking at a task before training: some batches, their loss, a head fitted for the while, the model left as found."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from adapterbank.errors import AdapterBankError

Loss = Callable[[nn.Module, Any], Tensor]


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """``model(**batch).loss``, as transformers' models give it for batches with labels.

    Raises:
        AdapterBankError: If there is none.
    """
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise AdapterBankError(
            "the model gave no loss: put labels into the batches, or pass loss=function(model, batch)"
        )
    found: Tensor = loss
    return found


def held_batches(batches: Iterable[Any], most: int) -> list[Any]:
    """The first batches, at most so many.

    Raises:
        AdapterBankError: If there are none.
    """
    held = list(islice(batches, most))
    if not held:
        raise AdapterBankError("there are no batches to take the gradient of")
    return held


@contextmanager
def fitted_head(
    model: nn.Module, adapter_name: str, batches: list[Any], loss: Loss, steps: int, lr: float
) -> Iterator[None]:
    """The modules to save, fitted for a few steps; put back afterwards: they would know these batches by heart."""
    mine = f".modules_to_save.{adapter_name}."
    heads = [p for n, p in model.named_parameters() if mine in n and p.requires_grad]
    before = [(head.detach().clone(), head.grad) for head in heads]
    try:
        if heads:
            _fit(model, heads, batches, loss, steps, lr)
        yield
    finally:
        with torch.no_grad():
            for head, (value, gradient) in zip(heads, before, strict=True):
                head.copy_(value)
                head.grad = gradient


def _fit(model: nn.Module, heads: list[nn.Parameter], batches: list[Any], loss: Loss, steps: int, lr: float) -> None:
    optimizer = torch.optim.AdamW(heads, lr=lr, weight_decay=0.0)
    with evaluating(model):
        for step in range(steps):
            value = loss(model, batches[step % len(batches)])
            gradients = torch.autograd.grad(value, heads, allow_unused=True)
            for head, gradient in zip(heads, gradients, strict=True):
                head.grad = gradient
            optimizer.step()
            optimizer.zero_grad()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode: dropout would blur gradients."""
    # modes differ from module to module, so each gets its own back
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
