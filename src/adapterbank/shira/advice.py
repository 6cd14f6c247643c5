"""Which adapters fit side by side: masks of families that will be fused."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from adapterbank.errors import AdapterBankError
from adapterbank.shira.masks import parts_of, stride_of

CROWDED = 0.5
"""Share of common positions from which on fused adapters are said to be in each other's way."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """How many adapters can be trained side by side on the same layers."""

    density: float
    """Of each."""
    parts: int
    """Masks ``wm`` of a ``part`` of their own: they share nothing. Parts of ``grad`` and ``snip`` follow each task's
    own gradient, so those of two tasks overlap."""
    offsets: int
    """Masks ``struct`` of an ``offset`` of their own: they share the diagonal only."""

    def advice(self, adapters: int) -> str:
        """One sentence on a family that will be fused.

        Args:
            adapters: How many it has.

        Raises:
            AdapterBankError: If it is empty.
        """
        if adapters < 1:
            raise AdapterBankError(f"adapters={adapters} is no family; give 1 or more")
        there = (
            f"at a density of {self.density:g} there are {_count(self.parts, 'part')} of wm, which share nothing, and "
            f"{_count(self.offsets, 'offset')} of struct, which share the diagonal only"
        )
        own = [word for word, number in (("a part", self.parts), ("an offset", self.offsets)) if adapters <= number]
        if not own:
            return f"{adapters} adapters don't fit side by side: {there}; choose a density below 1/{adapters}."
        return f"Adapters that will be fused want {' or '.join(own)} of their own: {there}."


def room(shapes: Iterable[tuple[int, int]], density: float) -> Room:
    """What the layer with the least room has.

    Args:
        shapes: ``(d_out, d_in)`` of every layer.
        density: Share of each layer's weights that an adapter changes.

    Raises:
        AdapterBankError: If there are no layers, or the density is no share.
    """
    found = set(shapes)
    if not found:
        raise AdapterBankError("there are no layers; give at least one shape")
    return Room(
        density=density,
        parts=min(parts_of(shape, density) for shape in found),
        offsets=min(stride_of(shape, density) for shape in found),
    )


def crowding(overlaps: Mapping[str, Mapping[str, float]]) -> str | None:
    """One sentence on the pair that shares most; none where that is little.

    Args:
        overlaps: Of every pair, from ``adapterbank.shira.overlaps``.
    """
    pairs = [(row[other], one, other) for one, row in overlaps.items() for other in row if other != one]
    share, one, other = max(pairs, key=lambda pair: pair[0], default=(0.0, "", ""))
    if share <= CROWDED:
        return None
    return (
        f"{one} and {other} share {share:.0%} of their positions: trained with a part (wm) or an offset (struct) of "
        "their own they would share nothing, or the diagonal only."
    )


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"
