"""Where the largest of many scores are, exactly, and without a second copy of them: they're looked at in chunks."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adapterbank.errors import AdapterBankError

CHUNK = 2**18
BUCKETS = 2**15
"""By the leading 16 bits, of which the sign is 0: they order floats that aren't negative as the floats themselves."""
Scores = Callable[[slice], Float[Tensor, " chunk"]]
"""Any stretch of the scores; none is negative."""


def largest(scores: Scores, total: int, count: int) -> Int[Tensor, " count"]:
    """Ascending positions of the ``count`` largest scores, on the CPU; of equal ones the first.

    Args:
        scores: Called three times for every stretch.
        total: How many there are.
        count: At most ``total``.

    Raises:
        AdapterBankError: If a score isn't finite.
    """
    least = _nth_largest(scores, total, count)
    above, tied, room = list[Tensor](), list[Tensor](), count
    for start, chunk in _chunks(scores, total):
        above.append((chunk > least).nonzero()[:, 0].cpu() + start)
        tied.append((chunk == least).nonzero()[:, 0].cpu() + start)
        room -= len(above[-1])
    return torch.cat([*above, torch.cat(tied)[:room]]).sort().values


def _nth_largest(scores: Scores, total: int, n: int) -> float:
    """By counting buckets, then by a search inside of one: a sort of all takes ten times as long."""
    counts = torch.zeros(BUCKETS, dtype=torch.int64)
    for _, chunk in _chunks(scores, total):
        if not bool(chunk.isfinite().all()):
            raise AdapterBankError(
                "a weight or gradient holds nan or inf, so it has no largest values; look at the loss"
            )
        counts += _bucket(chunk).bincount(minlength=BUCKETS).cpu()
    so_far = counts.flip(0).cumsum(0)
    place = int((so_far < n).sum())
    inside = [chunk[_bucket(chunk) == BUCKETS - 1 - place] for _, chunk in _chunks(scores, total)]
    smaller = int(so_far[place]) - n
    return float(torch.cat(inside).kthvalue(smaller + 1).values)


def _bucket(chunk: Float[Tensor, " chunk"]) -> Int[Tensor, " chunk"]:
    return chunk.view(torch.int64) >> 48 if chunk.dtype == torch.float64 else chunk.view(torch.int32) >> 16


def _chunks(scores: Scores, total: int) -> Iterator[tuple[int, Float[Tensor, " chunk"]]]:
    for start in range(0, total, CHUNK):
        chunk = scores(slice(start, start + CHUNK))
        yield start, (chunk if chunk.dtype == torch.float64 else chunk.float()).contiguous()
