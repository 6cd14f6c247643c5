"""Sparse adapters in a mixed batch: rows are grouped by adapter, and each group gets its sparse update added."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from adapterbank.adapters.live import layer_sizes
from adapterbank.adapters.names import match_modules
from adapterbank.errors import BankError
from adapterbank.runtime import ops
from adapterbank.runtime.batch import by_row
from adapterbank.runtime.layer import COMPUTE, device_of, hooked, is_conv1d
from adapterbank.shira import SparseDelta, SparseUpdate
from adapterbank.shira.delta import gathered


@dataclass(frozen=True, kw_only=True, eq=False)
class SparseMember:
    """One sparse adapter, ready to serve."""

    delta: SparseDelta
    updates: Mapping[str, SparseUpdate]
    """By layer of the model, each ``(d_out, d_in)``."""

    @property
    def name(self) -> str:
        """Of the adapter."""
        return self.delta.name

    @property
    def heads(self) -> Mapping[str, Tensor]:
        """Tensors of its task head, by name."""
        return self.delta.extras

    @property
    def bytes(self) -> int:
        """In memory."""
        tensors = [tensor for update in self.updates.values() for tensor in (update.positions, update.values)]
        return sum(tensor.nbytes for tensor in (*tensors, *self.heads.values()))

    @classmethod
    def of(cls, delta: SparseDelta, model: nn.Module) -> "SparseMember":
        """Of a model whose weights are the base model's; quantised ones are not read.

        Raises:
            BankError: If the model lacks a layer, or has it in another size.
            AdapterError: If the adapter's fingerprint tells another base.
        """
        where, layers = f"adapter {delta.name!r}", dict(model.named_modules())
        sizes = {f"{name}.weight": found for name, layer in layers.items() if (found := layer_sizes(layer))}
        places, updates, read = match_modules(delta.updates, sizes), {}, {}
        for parameter, update in delta.updates.items():
            if parameter not in places:
                raise BankError(f"{where}: {parameter} is of no linear layer of the model; use it with a Switcher")
            name = places[parameter].removesuffix(".weight")
            updates[name] = _oriented(update, is_conv1d(layers[name]))
            if updates[name].shape != sizes[places[parameter]][::-1]:
                raise BankError(
                    f"{where}, {parameter}: it is {updates[name].shape}, the model's layer "
                    f"{sizes[places[parameter]][::-1]}; is it of another base model?"
                )
            weight = layers[name].weight
            if isinstance(weight, Tensor) and weight.dtype in COMPUTE and not weight.is_meta:
                read[parameter] = gathered(weight, update.positions)
        delta.check_base(read)
        return cls(delta=delta, updates=updates)


def groups_of(
    members: Mapping[int, SparseMember], which: Sequence[int]
) -> dict[str, list[tuple[list[int], SparseUpdate]]]:
    """Rows and their update, of each adapter that changes a layer, by layer.

    Args:
        members: Of the batch, each once, by number.
        which: Number of each row; others than those of ``members`` are passed over.
    """
    found = dict[str, list[tuple[list[int], SparseUpdate]]]()
    for i, member in members.items():
        rows = [row for row, number in enumerate(which) if number == i]
        for layer, update in member.updates.items():
            found.setdefault(layer, []).append((rows, update))
    return found


def _oriented(update: SparseUpdate, conv1d: bool) -> SparseUpdate:
    """As ``(d_out, d_in)``; GPT-2's Conv1D has the reverse."""
    if not conv1d:
        return update
    rows, columns = update.shape
    positions = update.positions.long()
    return SparseUpdate.of(positions % columns * rows + positions // columns, update.values, (columns, rows))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Groups:
    """What the rows of a batch need at one layer."""

    batch: int
    """Rows of the batch."""
    rows: Int[Tensor, " m"]
    """Those with an update here, one group after the other."""
    sizes: list[int]
    """Rows of each group."""
    matrices: list[Tensor]
    """Its update."""


class SparseLayer:
    """A linear layer whose output gets, in each group of rows, the update of the group's sparse adapter added.

    The weights stay the base model's, so that rows of other adapters and of none go through the same layer at the
    same time; a switch for each group would read the weights once for each.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.active: _Groups | None = None
        self._handle = hooked(layer, self._hook)

    def release(self) -> None:
        """Leave the layer as it was."""
        self._handle.remove()

    def activate(self, groups: Sequence[tuple[Sequence[int], SparseUpdate]], batch: int) -> None:
        """Set the rows of the next forwards.

        Args:
            groups: Rows, and their update.
            batch: Rows of the batch.
        """
        if not groups:
            self.active = None
            return
        device = device_of(self.layer) or torch.device("cpu")
        updates = (update for _, update in groups)
        self.active = _Groups(
            batch=batch,
            rows=torch.tensor([row for rows, _ in groups for row in rows], device=device),
            sizes=[len(rows) for rows, _ in groups],
            matrices=[
                ops.compressed(update.positions.to(device), update.values.to(device, torch.float32), update.shape)
                for update in updates
            ],
        )

    def _hook(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        groups = self.active
        if groups is None:
            return None
        parts = torch.split(by_row(args[0], groups.batch)[groups.rows], groups.sizes)
        delta = torch.cat([ops.through_sparse(x, S) for x, S in zip(parts, groups.matrices, strict=True)])
        # not a sum over all: rows of the base model stay as they are, to the bit
        return by_row(output, groups.batch).index_add(0, groups.rows, delta.to(output.dtype)).view(output.shape)
