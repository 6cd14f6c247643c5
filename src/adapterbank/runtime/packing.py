"""Matrices at 8, 16 or 32 bits a value, unpacked when they're used."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from adapterbank.errors import BankError

TYPES = {8: torch.int8, 16: torch.int16, 32: torch.float32}


def check_bits(bits: int) -> None:
    """Whether matrices can be packed so.

    Raises:
        BankError: If ``bits`` is none of 8, 16 and 32.
    """
    if bits not in TYPES:
        raise BankError(f"tables have 8, 16 or 32 bits a value, not {bits}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """A matrix as integers with one step a row, or at 32 bits as it is."""

    codes: Tensor
    steps: Tensor | None
    """One a row; none at 32 bits."""

    @classmethod
    def of(cls, matrix: Float[Tensor, "rows columns"], bits: int) -> "Packed":
        """Pack; at 16 bits a value is off by at most ``2**-16`` of the largest in its row, at 8 by ``2**-8``.

        Raises:
            BankError: If ``bits`` is none of 8, 16 and 32.
        """
        check_bits(bits)
        matrix = matrix.detach().float()
        if bits == 32:
            return cls(codes=matrix.contiguous(), steps=None)
        largest = matrix.abs().amax(dim=1, keepdim=True) if matrix.numel() else matrix.new_zeros(len(matrix), 1)
        steps = largest / (2 ** (bits - 1) - 1)
        codes = (matrix / steps.clamp_min(torch.finfo(torch.float32).tiny)).round()
        return cls(codes=codes.to(TYPES[bits]).contiguous(), steps=steps)

    @classmethod
    def joined(cls, matrices: "Sequence[Packed]") -> "Packed":
        """Values of several, one after the other, and the steps of all their rows."""
        codes = torch.cat([matrix.codes.flatten() for matrix in matrices])
        steps = [matrix.steps.flatten() for matrix in matrices if matrix.steps is not None]
        return cls(codes=codes, steps=torch.cat(steps) if steps else None)

    @classmethod
    def stacked(cls, matrices: "Sequence[Packed]") -> "Packed":
        """Several of one shape, with an axis ``m`` in front."""
        steps = [matrix.steps for matrix in matrices if matrix.steps is not None]
        return cls(
            codes=torch.stack([matrix.codes for matrix in matrices]), steps=torch.stack(steps) if steps else None
        )

    def to(self, device: torch.device) -> "Packed":
        """On another device."""
        if self.codes.device == device:
            return self
        return Packed(codes=self.codes.to(device), steps=None if self.steps is None else self.steps.to(device))

    def unpacked(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values, in the shape of the codes."""
        if self.steps is None:
            return self.codes.to(dtype)
        # in float32, as types of 16 bits hold the larger codes only roughly; in place, as fresh pages cost more
        return self.codes.to(torch.float32).mul_(self.steps).to(dtype)

    @property
    def bytes(self) -> int:
        """In memory."""
        return self.codes.nbytes + (0 if self.steps is None else self.steps.nbytes)
