"""Entries of a weight's gradient at a mask's positions, without the gradient itself.

Of ``g^T x`` a mask keeps one or two per cent. Computing those alone costs as many products less, but reads a row of
``g^T`` and one of ``x^T`` for each: a compiled loop over blocks of tokens, whose ``x^T`` stays in the cache, is ten
times faster than the whole product; in plain torch the whole product in slices wins from about a hundred tokens on.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 128
"""Tokens at a time: ``x^T`` of a layer of 2048 features then takes 1 MB."""
GATHER_TOKENS = 100
"""Without a compiler, up to so many tokens are gathered row by row."""
SLICE_BYTES = 1 << 24
"""Of the whole product at a time."""


def sampled_gradient(
    g: Float[Tensor, "t d_out"], x: Float[Tensor, "t d_in"], positions: Int[Tensor, " nnz"]
) -> Float[Tensor, " nnz"]:
    """Semantics: ``(g.T @ x).view(-1)[positions]``, in float32.

    Args:
        g: Gradient of the layer's output.
        x: Its input.
        positions: Flat, row-major, ascending.
    """
    kernel = _compiled() if g.device.type == "cpu" else None
    if kernel is not None:
        return _by_kernel(kernel, g, x, positions)
    if len(g) <= GATHER_TOKENS:
        return _gathered(g, x, positions)
    return _sliced(g, x, positions)


def _by_kernel(kernel: Callable[..., None], g: Tensor, x: Tensor, positions: Tensor) -> Tensor:
    columns = x.shape[1]
    bounds = torch.searchsorted(positions, torch.arange(g.shape[1] + 1, dtype=positions.dtype) * columns)
    found = torch.zeros(len(positions))
    for start in range(0, len(g), BLOCK):
        g_T = g[start : start + BLOCK].T.float().contiguous()  # (d_out, block)
        x_T = x[start : start + BLOCK].T.float().contiguous()  # (d_in, block)
        kernel(g_T.numpy(), x_T.numpy(), bounds.numpy(), positions.numpy(), columns, found.numpy())
    return found


def _gathered(g: Tensor, x: Tensor, positions: Tensor) -> Tensor:
    rows = positions.long() // x.shape[1]
    return (g.T.float()[rows] * x.T.float()[positions.long() - rows * x.shape[1]]).sum(1)


def _sliced(g: Tensor, x: Tensor, positions: Tensor) -> Tensor:
    found = torch.empty(len(positions), device=g.device)
    wide = x.float()
    with torch.autocast(g.device.type, enabled=False):  # it would multiply in 16 bits
        for rows, cut, inside in row_slices((g.shape[1], x.shape[1]), positions):
            if len(inside):
                found[cut] = (g[:, rows].T.float() @ wide).view(-1)[inside]
    return found


def row_slices(shape: Sequence[int], positions: Int[Tensor, " nnz"]) -> Iterator[tuple[slice, slice, Tensor]]:
    """Slices of a matrix's rows: which rows, which of the ascending positions lie there, and where in the slice."""
    rows, columns = shape
    step = max(1, SLICE_BYTES // (4 * columns))
    starts = torch.arange(0, rows + step, step, device=positions.device, dtype=torch.int64).clamp_max(rows)
    cuts = torch.searchsorted(positions.long(), starts * columns).tolist()
    for start, (first, last) in zip(range(0, rows, step), pairwise(cuts), strict=True):
        yield slice(start, start + step), slice(first, last), positions[first:last].long() - start * columns


def _add_products(g_T: Any, x_T: Any, bounds: Any, positions: Any, columns: int, found: Any) -> None:
    """Add ``g_T[row] @ x_T[column]`` to what was found at every position; arrays of numpy."""
    tokens = g_T.shape[1]
    for row in range(g_T.shape[0]):
        first = row * columns
        for place in range(bounds[row], bounds[row + 1]):
            column, total = positions[place] - first, g_T[row, 0] * 0
            for token in range(tokens):
                total += g_T[row, token] * x_T[column, token]
            found[place] += total


@functools.cache
def _compiled() -> Callable[..., None] | None:
    """The loop in machine code, where numba is installed."""
    if find_spec("numba") is None:
        return None
    import numba

    # unwrapped: tests put shape checks around every function. fastmath lets the sum over tokens use vector registers
    compile_it: Any = functools.partial(numba.njit, inspect.unwrap(_add_products), fastmath=True, nogil=True)
    try:
        compiled: Callable[..., None] = compile_it(cache=True)
    except RuntimeError:  # no folder that can be written to: compile again in every process, 3 s
        compiled = compile_it()
    return compiled
