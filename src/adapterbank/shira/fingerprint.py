"""Which base model a sparse adapter was made for: hashes of the values that it changes."""

import hashlib

import torch
from jaxtyping import Float
from torch import Tensor

from adapterbank.errors import AdapterError

Fingerprint = tuple[int, int, int]
"""Hashes of base values, 64 bits each, as signed integers; zeros where no base was at hand."""
_HASHED = (torch.float32, torch.bfloat16, torch.float16)


def fingerprint_of(values: Float[Tensor, " nnz"]) -> Fingerprint:
    """Hashes of a weight's values at an adapter's positions, as float32, bfloat16 and float16.

    Two copies of one model in different precisions agree in at least one of them, the coarser one's. Only a float32
    model that was rounded to float16 here and to bfloat16 there is not known again.
    """
    cast = (values.detach().cpu().to(dtype).contiguous().view(torch.uint8).numpy() for dtype in _HASHED)
    digests = (hashlib.sha256(part.tobytes()).digest()[:8] for part in cast)
    wide, brain, half = (int.from_bytes(digest, "big", signed=True) for digest in digests)
    return wide, brain, half


def read_fingerprint(stored: Tensor) -> Fingerprint | None:
    """A fingerprint as a file holds it; none where it is unknown.

    Raises:
        AdapterError: If it is none.
    """
    if stored.dtype != torch.int64 or stored.shape != (len(_HASHED),):
        raise AdapterError(
            f"its fingerprint is {stored.dtype} {tuple(stored.shape)}, expected int64 ({len(_HASHED)},); copy it again"
        )
    wide, brain, half = stored.tolist()
    return (wide, brain, half) if any((wide, brain, half)) else None


def check_fingerprint(one: Fingerprint, other: Fingerprint) -> bool:
    """Whether two fingerprints can be of one base model."""
    return any(a == b for a, b in zip(one, other, strict=True))
