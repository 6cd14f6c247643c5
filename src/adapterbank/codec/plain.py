"""Matrices as they are, in float32 or in 16-bit integers with one scale: for exact ranks and the papers' methods."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from adapterbank.errors import BankError

BITS = (16, 32)
_LARGEST = 2**15 - 1


def packed_bytes(values: int, bits: int) -> int:
    """Bytes that a matrix of so many values takes."""
    return values * bits // 8 + (4 if bits == 16 else 0)


class PlainWriter:
    """Collects matrices in order.

    Args:
        bits: 16 or 32 bits a value.
    """

    def __init__(self, bits: int) -> None:
        if bits not in BITS:
            raise BankError(f"plain matrices take 16 or 32 bits a value, not {bits}")
        self._bits = bits
        self._parts: list[np.ndarray] = []

    def matrix(self, values: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
        """Store a matrix and return what a reader will see."""
        array = values.detach().to(torch.float32).contiguous().numpy()
        if self._bits == 32:
            self._parts.append(array.astype("<f4").reshape(-1).view(np.uint8))
            return torch.from_numpy(array.copy())
        # one scale a matrix, not a row: its values are coefficients of balanced vectors, alike in size
        scale = np.float32(np.abs(array).max(initial=0) / _LARGEST)
        codes = np.rint(array / scale).astype("<i2") if scale > 0 else np.zeros(array.shape, dtype="<i2")
        self._parts += [np.array([scale], dtype="<f4").view(np.uint8), codes.reshape(-1).view(np.uint8)]
        return torch.from_numpy(codes.astype(np.float32) * scale)

    def finish(self) -> np.ndarray:
        """All bytes."""
        return np.concatenate([np.zeros(0, dtype=np.uint8), *self._parts])


class PlainReader:
    """Reads what a ``PlainWriter`` wrote, in the same order.

    Raises:
        BankError: If there are fewer bytes than asked for.
    """

    def __init__(self, payload: np.ndarray, bits: int) -> None:
        self._payload, self._bits, self._at = payload, bits, 0

    def matrix(self, rows: int, cols: int) -> Float[Tensor, "rows cols"]:
        """The next matrix."""
        if self._bits == 32:
            return torch.from_numpy(self._take(rows * cols * 4).view("<f4").astype(np.float32).reshape(rows, cols))
        scale = self._take(4).view("<f4").astype(np.float32)
        codes = self._take(rows * cols * 2).view("<i2").reshape(rows, cols)
        return torch.from_numpy(codes.astype(np.float32) * scale)

    def _take(self, size: int) -> np.ndarray:
        taken = self._payload[self._at : self._at + size]
        if len(taken) < size:
            raise BankError(f"a payload is damaged: {size} bytes expected at {self._at}, {len(taken)} found")
        self._at += size
        # a copy, as a view from an odd offset can't be read as wider numbers
        copy: np.ndarray = taken.copy()
        return copy
