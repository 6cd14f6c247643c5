"""A linear layer on a weight with changed values, as two operators of torch: forward, and its gradients.

The values are written into the weight for the time of a product and taken back: no copy of the weight is made or saved,
and between two calls the weight is the base model's, bit for bit. Both operators are opaque to ``torch.compile``.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adapterbank.shira.delta import changed
from adapterbank.shira.sampling import sampled_gradient

WRITING = threading.RLock()
"""Held while a weight isn't the base model's: another thread would take the values for it."""


@contextmanager
def written(weight: Tensor, positions: Tensor, values: Tensor) -> Iterator[None]:
    """Add values to a weight's entries, and put back what was there; one thread at a time."""
    flat = weight.data.view(-1)  # .data: a write that's taken back is none to autograd
    index = positions.long()  # scatter_ takes no int32
    with WRITING:
        base = flat.index_select(0, index)
        new = changed(base, values)
        try:  # an interrupt may come right after the first write
            flat.scatter_(0, index, new)
            yield
        finally:
            flat.scatter_(0, index, base)


@torch.library.custom_op("adapterbank::sparse_linear", mutates_args=())
def sparse_linear(
    x: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor, transposed: bool
) -> Tensor:
    """Semantics: ``x @ (W + S).T + bias``, with ``S.view(-1)[positions] = values`` and ``W`` as it was afterwards.

    Args:
        x: ``(..., d_in)``.
        values: ``(nnz,)``, in any float type.
        weight: ``(d_out, d_in)``; with ``transposed`` ``(d_in, d_out)``, as GPT-2's Conv1D has it.
        bias: ``(d_out,)``.
        positions: ``(nnz,)``, flat positions in ``weight``, ascending.
        transposed: Which way the weight is stored.
    """
    with written(weight, positions, values):
        matrix = weight.to(x.dtype)
        return F.linear(x, matrix.T if transposed else matrix, None if bias is None else bias.to(x.dtype))


@sparse_linear.register_fake
def _(x: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor, transposed: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1 if transposed else 0]))


@torch.library.custom_op("adapterbank::sparse_linear_backward", mutates_args=())
def sparse_linear_backward(
    g: Tensor, x: Tensor, values: Tensor, weight: Tensor, positions: Tensor, transposed: bool, needed: list[bool]
) -> list[Tensor]:
    """Gradients of ``x``, ``values`` and ``weight``, that one dense; an empty one where it isn't needed."""
    grad_x, grad_values, grad_weight = x.new_empty(0), values.new_empty(0), weight.new_empty(0)
    if needed[0]:
        with written(weight, positions, values):
            matrix = weight.to(g.dtype)
            grad_x = (g @ (matrix.T if transposed else matrix)).to(x.dtype).contiguous()
    tokens, seen = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
    left, right = (seen, tokens) if transposed else (tokens, seen)
    if needed[1]:
        grad_values = sampled_gradient(left, right, positions).to(values.dtype)
    if needed[2]:
        grad_weight = (left.T @ right).to(weight.dtype)
    return [grad_x, grad_values, grad_weight]


@sparse_linear_backward.register_fake
def _(
    g: Tensor, x: Tensor, values: Tensor, weight: Tensor, positions: Tensor, transposed: bool, needed: list[bool]
) -> list[Tensor]:
    return [t.new_empty(t.shape if n else (0,)) for t, n in zip((x, values, weight), needed, strict=True)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, weight, bias, positions, ctx.transposed = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, values, weight, positions)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, values, weight, positions = ctx.saved_tensors
    needed = [bool(need) for need in ctx.needs_input_grad[:3]]
    found = sparse_linear_backward(g, x, values, weight, positions, ctx.transposed, needed)
    grad_bias = g.reshape(-1, g.shape[-1]).sum(0) if ctx.has_bias and ctx.needs_input_grad[3] else None
    return *(grad if n else None for grad, n in zip(found, needed, strict=True)), grad_bias, None, None


sparse_linear.register_autograd(_backward, setup_context=_save)
