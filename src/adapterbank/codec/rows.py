"""Rows at 4 or 8 bits beside one float32 scale each, as one byte tensor: simple enough to be unpacked at every step."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from adapterbank.errors import BankError

ROW_BITS = (4, 8)
_SCALE_BYTES = 4
# clipping at so many standard deviations costs least at 4 bits for Gaussian values (Max 1960: 16 levels, step 0.335)
_STEP_4 = 0.335


def packed_width(d: int, bits: int) -> int:
    """Bytes of one packed row of ``d`` values."""
    return -(-d * bits // 8) + _SCALE_BYTES


def pack_rows(rows: Float[Tensor, "m d"], bits: int) -> UInt8[Tensor, "m width"]:
    """Quantise rows to integers, two of them a byte at 4 bits, with the step of each row in its last four bytes.

    Args:
        rows: Finite values.
        bits: 4 or 8.

    Raises:
        BankError: If ``bits`` is another number.
    """
    _check(bits)
    rows = rows.float().cpu()
    if bits == 4:
        step = _STEP_4 * rows.square().mean(dim=1).sqrt()
        # levels at odd multiples of half a step: 16 of them, none wasted on zero
        codes = (rows / step.clamp_min(1e-30)[:, None] - 0.5).round().clamp(-8, 7) + 8
        if codes.shape[1] % 2:
            codes = torch.nn.functional.pad(codes, (0, 1))
        body = (codes[:, 0::2] + 16 * codes[:, 1::2]).to(torch.uint8)
    else:
        step = rows.abs().amax(dim=1) / 127
        body = ((rows / step.clamp_min(1e-30)[:, None]).round().clamp(-127, 127) + 128).to(torch.uint8)
    return torch.cat([body, step[:, None].contiguous().view(torch.uint8)], dim=1)


def unpack_rows(packed: UInt8[Tensor, "m width"], d: int, bits: int) -> Float[Tensor, "m d"]:
    """What ``pack_rows`` kept, in float32 on the packed tensor's device.

    Raises:
        BankError: If the rows have another width.
    """
    _check(bits)
    if packed.shape[1] != packed_width(d, bits):
        raise BankError(
            f"packed rows are {packed.shape[1]} bytes wide; {d} values of {bits} bits need {packed_width(d, bits)}"
        )
    # flat and a copy: a view as floats needs bytes that are aligned
    body, step = packed[:, :-_SCALE_BYTES], packed[:, -_SCALE_BYTES:].flatten().clone().view(torch.float32)[:, None]
    if bits == 8:
        return (body.float() - 128) * step
    values = torch.stack([body & 15, body >> 4], dim=2).flatten(1)[:, :d]
    return (values.float() - 7.5) * step


def _check(bits: int) -> None:
    if bits not in ROW_BITS:
        raise BankError(f"rows are packed at 4 or 8 bits, not {bits}")
