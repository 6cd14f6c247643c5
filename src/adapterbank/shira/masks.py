"""Which weights of a layer an adapter changes: five rules from weight, gradient or seed to positions (SHiRA, B).

A mask is a vector of flat positions in row-major order, ascending, without repetition: int32 where that reaches, else
int64. The same arguments give the same positions: ties go to the lowest one, draws are numpy's.
"""

import math
import zlib
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from adapterbank.errors import AdapterBankError
from adapterbank.shira.selection import Scores, largest

Kind = Literal["struct", "rand", "wm", "grad", "snip"]
KINDS: tuple[Kind, ...] = ("struct", "rand", "wm", "grad", "snip")
GRADIENT_KINDS: tuple[Kind, ...] = ("grad", "snip")
"""Those that need a gradient."""
LARGEST_INT32 = 2**31 - 1


def count_of(shape: tuple[int, int], density: float) -> int:
    """Positions of a layer at a density: ``round(density * n * m)``, at least 1.

    Raises:
        AdapterBankError: Unless ``0 < density <= 1``.
    """
    if not 0 < density <= 1:
        raise AdapterBankError(f"density={density} is no share of a layer's weights; give a number in (0, 1]")
    return max(1, round(density * shape[0] * shape[1]))


def choose(
    kind: str,
    weight: Float[Tensor, "d_out d_in"],
    density: float,
    *,
    part: int = 0,
    offset: int = 0,
    seed: int = 0,
    name: str = "",
) -> Int[Tensor, " nnz"]:
    """A mask that needs no gradient, by its kind: ``struct``, ``rand`` or ``wm``.

    Args:
        kind: Of :data:`KINDS`.
        weight: The layer's; of ``struct`` and ``rand`` only its shape is looked at.
        density: Share of the weights.
        part: Of ``wm``.
        offset: Of ``struct``.
        seed: Of ``rand``.
        name: The layer's, for ``rand``.

    Raises:
        AdapterBankError: If the kind is unknown or needs a gradient, or has no such part, offset or seed.
    """
    if kind in GRADIENT_KINDS:
        raise AdapterBankError(
            f"mask {kind!r} follows the task's gradient, which a model alone doesn't have; choose it with "
            "adapterbank.shira.calibrate, or with adapterbank shira train"
        )
    if kind not in KINDS:
        raise AdapterBankError(f"mask {kind!r} is unknown; choose from {', '.join(KINDS)}")
    for option, value, owner in (("part", part, "wm"), ("offset", offset, "struct"), ("seed", seed, "rand")):
        if value and kind != owner:
            raise AdapterBankError(f"{option}={value}: {kind} has none, {owner} has; leave it out")
    if kind == "struct":
        return struct(_shape(weight), density, offset=offset)
    return rand(_shape(weight), density, seed=seed, name=name) if kind == "rand" else wm(weight, density, part=part)


def struct(shape: tuple[int, int], density: float, *, offset: int = 0) -> Int[Tensor, " nnz"]:
    """Whole rows and the diagonal, within a row of the density; at least one row and the diagonal.

    Rows are ``offset, offset + f, ...``, as in the paper. Where these would be over a row too many, as many as are
    wanted lie ``f`` or ``f + 1`` apart. Masks of different offsets below :func:`stride_of`, which is ``f``, share
    nothing but the diagonal.

    Args:
        shape: ``(d_out, d_in)``.
        density: Share of the weights.
        offset: First row.

    Raises:
        AdapterBankError: If the offset is not below the stride.
    """
    rows, columns = shape
    stride = stride_of(shape, density)
    if not 0 <= offset < stride:
        raise AdapterBankError(f"offset={offset} is outside [0, {stride}): every {stride}th row of {rows} is taken")
    chosen, wanted = torch.arange(offset, rows, stride), count_of(shape, density)
    if math.ceil(rows / stride) * _row_cost(shape) + min(shape) > wanted + columns:
        whole = _whole_rows(shape, density)
        chosen = offset + torch.arange(whole) * rows // whole
    inside = (chosen[:, None] * columns + torch.arange(columns)).flatten()
    diagonal = torch.arange(min(shape)) * (columns + 1)
    return _positions(torch.unique(torch.cat([inside, diagonal])), shape)


def stride_of(shape: tuple[int, int], density: float) -> int:
    """Every so many rows are whole in a struct mask: as many masks of one family can stand beside each other."""
    return shape[0] // _whole_rows(shape, density)


def _whole_rows(shape: tuple[int, int], density: float) -> int:
    wanted = (count_of(shape, density) - min(shape)) / _row_cost(shape)
    return min(shape[0], max(1, round(wanted)))


def _row_cost(shape: tuple[int, int]) -> float:
    """What a row has beside the diagonal, which a tall layer's last rows don't meet; a mean."""
    return shape[1] - min(shape) / shape[0] or 1.0


def parts_of(shape: tuple[int, int], density: float) -> int:
    """So many masks by size share nothing: ``part`` is below this."""
    return shape[0] * shape[1] // count_of(shape, density)


def rand(
    shape: tuple[int, int], density: float, *, seed: int = 0, name: str = "", bernoulli: bool = False
) -> Int[Tensor, " nnz"]:
    """Positions drawn without preference.

    Args:
        shape: ``(d_out, d_in)``.
        density: Share of the weights.
        seed: Of the draw, from 0.
        name: The layer's: with one seed, layers of equal shapes get different masks, whatever the order of the calls.
        bernoulli: Each position by itself, as in the paper (B.2); by default exactly :func:`count_of`.

    Raises:
        AdapterBankError: If the seed is negative, or the density is no share.
    """
    if seed < 0:
        raise AdapterBankError(f"seed={seed} is negative; give 0 or more")
    seeded, total = np.random.default_rng([seed, zlib.crc32(name.encode())]), shape[0] * shape[1]
    count = count_of(shape, density)
    if bernoulli:
        count = int(seeded.binomial(total, density))
    return _positions(torch.from_numpy(np.sort(seeded.choice(total, count, replace=False, shuffle=False))), shape)


def wm(weight: Float[Tensor, "d_out d_in"], density: float, *, part: int = 0) -> Int[Tensor, " nnz"]:
    """The largest magnitudes of the weight.

    Args:
        weight: The layer's.
        density: Share of the weights.
        part: 0 for the largest, 1 for the next as many, and so on: masks of a family that share nothing (section
            5.3.2 of the paper).
    """
    flat = weight.detach().flatten()
    return _largest(lambda where: flat[where].abs(), _shape(weight), density, part)


def grad(gradient: Float[Tensor, "d_out d_in"], density: float, *, part: int = 0) -> Int[Tensor, " nnz"]:
    """The largest magnitudes of the gradient; arguments as in :func:`wm`."""
    return wm(gradient, density, part=part)


def snip(
    weight: Float[Tensor, "d_out d_in"], gradient: Float[Tensor, "d_out d_in"], density: float, *, part: int = 0
) -> Int[Tensor, " nnz"]:
    """The largest ``|weight * gradient|`` (SNIP, arXiv:1810.02340); arguments as in :func:`wm`."""
    one, other = weight.detach().flatten(), gradient.detach().flatten()
    return _largest(lambda where: (one[where].float() * other[where].float()).abs(), _shape(weight), density, part)


def _shape(weight: Float[Tensor, "d_out d_in"]) -> tuple[int, int]:
    return int(weight.shape[0]), int(weight.shape[1])


def _largest(scores: Scores, shape: tuple[int, int], density: float, part: int) -> Int[Tensor, " nnz"]:
    count, total = count_of(shape, density), shape[0] * shape[1]
    if not 0 <= part < parts_of(shape, density):
        raise AdapterBankError(f"part={part}: a layer of {total} weights has no {part + 1} parts of {count}")
    upto = largest(scores, total, (part + 1) * count)
    if part:  # both are exact and deterministic, so the smaller set lies in the larger one
        left = torch.zeros(total, dtype=torch.bool)
        left[upto] = True
        left[largest(scores, total, part * count)] = False
        upto = left.nonzero()[:, 0]
    return _positions(upto, shape)


def _positions(ascending: Int[Tensor, " nnz"], shape: tuple[int, int]) -> Int[Tensor, " nnz"]:
    return ascending.to(dtype_of(shape))


def dtype_of(shape: tuple[int, int]) -> torch.dtype:
    """Of a layer's positions."""
    return torch.int32 if shape[0] * shape[1] <= LARGEST_INT32 else torch.int64
