"""From the members of a batch to what each layer needs for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from adapterbank.errors import AdapterBankError
from adapterbank.runtime.members import Layout, Member, Private
from adapterbank.runtime.packing import Packed


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """What the rows of a batch need at one layer; ``m`` of them have an update here, of rank ``r`` or less."""

    batch: int
    """Rows of the batch."""
    places: Int[Tensor, " m"] | None
    """Which of them; none: all."""
    coef_A: Float[Tensor, "m r k_in"]
    coef_B: Float[Tensor, "m k_out r"]
    private: tuple[Private | None, ...]
    """Of each of them; empty if none has any here."""

    def to(self, device: torch.device, dtype: torch.dtype) -> "Rows":
        """Where the layer is, in the type that it computes in."""
        return Rows(
            batch=self.batch,
            places=None if self.places is None else self.places.to(device),
            coef_A=self.coef_A.to(device, dtype),
            coef_B=self.coef_B.to(device, dtype),
            private=self.private,
        )


def by_row(tensor: Float[Tensor, "..."], batch: int) -> Float[Tensor, "batch t d"]:
    """A layer's input or output as rows of tokens: beams of a row, and tokens where a model flattens them, follow.

    Raises:
        AdapterBankError: If it can't be divided among so many rows.
    """
    check_rows(tensor.shape[0], batch)
    return tensor.reshape(batch, -1, tensor.shape[-1])


def check_rows(found: int, batch: int) -> int:
    """How many of a layer's rows there are for each of the batch's.

    Raises:
        AdapterBankError: If they can't be divided so.
    """
    if found % batch:
        raise AdapterBankError(
            f"a layer sees {found} rows in a batch of {batch} adapters; give one name for every row, or, if the model "
            "calls the layer with something else too (DeBERTa with positions), serve one member at a time with merged()"
        )
    return found // batch


def rows_of(members: Mapping[int, Member], which: Sequence[int]) -> dict[str, Rows]:
    """What each layer needs; layers that no row changes are left out.

    Args:
        members: Of the batch, each once, by number.
        which: Number of each row; others than those of ``members`` are passed over.
    """
    groups = dict[Layout, list[int]]()  # rows by layout: members alike are unpacked together
    for row, i in enumerate(which):
        if i in members:
            groups.setdefault(members[i].layout, []).append(row)
    found = {
        layout: Packed.stacked([members[which[row]].coefficients for row in rows]) for layout, rows in groups.items()
    }
    layers = dict.fromkeys(layer for layout in groups for layer, place in layout.places.items() if place.r)
    return {layer: _rows(layer, groups, found, members, which) for layer in layers}


def _rows(
    layer: str,
    groups: dict[Layout, list[int]],
    stacked: dict[Layout, Packed],
    members: Mapping[int, Member],
    which: Sequence[int],
) -> Rows:
    having = [(layout, rows) for layout, rows in groups.items() if layer in layout.places and layout.places[layer].r]
    parts = [layout.places[layer].of(stacked[layout]) for layout, _ in having]
    places = [row for _, rows in having for row in rows]
    private = tuple(members[which[row]].private.get(layer) for row in places)
    return Rows(
        batch=len(which),
        places=None if places == list(range(len(which))) else torch.tensor(places),
        coef_A=_joined([coef_A for coef_A, _ in parts], 1),
        coef_B=_joined([coef_B for _, coef_B in parts], 2),
        private=private if any(private) else (),
    )


def _joined(parts: list[Float[Tensor, "_ _ _"]], axis: int) -> Float[Tensor, "_ _ _"]:
    """One after the other, padded with zeros to the largest rank, which is on ``axis``."""
    if len(parts) == 1:
        return parts[0]
    r = max(part.shape[axis] for part in parts)
    # pad takes the last axis first
    return torch.cat([pad(part, (0, 0) * (2 - axis) + (0, r - part.shape[axis])) for part in parts])
