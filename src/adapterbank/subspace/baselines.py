"""What a shared basis must beat: rivals that code every adapter alone, at the bytes they really need."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from adapterbank.errors import BankError
from adapterbank.subspace.updates import balanced, thin_svd, truncate

GROUP = 64
"""Values that share one float16 scale: 8.25 or 4.25 bits a value."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Coded:
    """Factors as decoded, ``dW' = B @ A`` with scale 1, and what they cost."""

    A: Float[Tensor, "p d_in"]
    B: Float[Tensor, "d_out p"]
    bytes: int
    """Payload alone: no header, no metadata, so a rival is never charged for our file format."""


Rival = Callable[[Tensor, Tensor, float], Coded]


def quantized(A: Float[Tensor, "r d_in"], B: Float[Tensor, "d_out r"], scale: float = 1.0, *, bits: int = 8) -> Coded:
    """Round both factors to ``bits`` bits, symmetric, one absmax scale per group.

    Args:
        A: Input factor.
        B: Output factor.
        scale: Folded into the decoded ``B``.
        bits: 2 to 8.

    Raises:
        BankError: If ``bits`` is outside 2 to 8.
    """
    # B by columns: they're what scale alike, so this is the better rival
    (A2, size_A), (B2, size_B) = _round(A, bits), _round(B.T, bits)
    return Coded(A=A2, B=scale * B2.T, bytes=size_A + size_B)


def truncated_svd(
    A: Float[Tensor, "r d_in"], B: Float[Tensor, "d_out r"], scale: float = 1.0, *, rank: int, bits: int = 16
) -> Coded:
    """Keep the ``rank`` leading singular vectors of the update, balanced, at 32, 16 or fewer bits a value.

    Args:
        A: Input factor.
        B: Output factor.
        scale: Factor of the update.
        rank: Singular vectors a side; all where there are fewer.
        bits: 32 and 16 store floats, 2 to 8 quantise as ``quantized`` does.

    Raises:
        BankError: If ``rank`` is below 1 or ``bits`` isn't 2 to 8, 16 or 32.
    """
    if rank < 1:
        raise BankError(f"a truncated SVD needs rank >= 1, not {rank}")
    A, B = balanced(truncate(thin_svd(A, B, scale), rank))
    if bits == 32:
        return Coded(A=A, B=B, bytes=4 * (A.numel() + B.numel()))
    if bits == 16:
        return Coded(A=A.half().float(), B=B.half().float(), bytes=2 * (A.numel() + B.numel()))
    return quantized(A, B, bits=bits)


def rivals(rank: int) -> dict[str, Rival]:
    """Every rival for adapters of this rank by name: ``int8``, ``int4``, ``svd4``, ``svd4+int8``, ``svd4+int4``...

    Args:
        rank: The largest rank among the adapters; the SVDs keep 1, 2, 4... up to it.
    """
    table: dict[str, Rival] = {f"int{bits}": _quantizer(bits) for bits in (8, 4)}
    kept = 1
    while kept <= rank:
        for suffix, bits in (("", 16), ("+int8", 8), ("+int4", 4)):
            table[f"svd{kept}{suffix}"] = _svd(kept, bits)
        kept *= 2
    return table


def _quantizer(bits: int) -> Rival:
    return lambda A, B, scale: quantized(A, B, scale, bits=bits)


def _svd(rank: int, bits: int) -> Rival:
    return lambda A, B, scale: truncated_svd(A, B, scale, rank=rank, bits=bits)


def _round(rows: Float[Tensor, "m d"], bits: int) -> tuple[Float[Tensor, "m d"], int]:
    if not 2 <= bits <= 8:
        raise BankError(f"quantisation takes 2 to 8 bits, not {bits}")
    flat = rows.float().reshape(-1)
    groups = -(-flat.numel() // GROUP)
    padded = torch.nn.functional.pad(flat, (0, groups * GROUP - flat.numel())).view(groups, GROUP)
    # float16 as stored; its largest finite value, because an infinite scale would decode to nan
    absmax = padded.abs().amax(dim=1, keepdim=True).clamp_max(65504).half().float()
    levels = 2 ** (bits - 1) - 1
    step = torch.where(absmax > 0, absmax / levels, 1.0)
    decoded = (padded / step).round().clamp(-levels, levels) * step
    size = -(-flat.numel() * bits // 8) + 2 * groups
    return decoded.view(-1)[: flat.numel()].view(rows.shape), size
