"""Task heads of members: each row of a batch goes through its own member's."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

State = Mapping[str, Tensor]
"""Tensors of a head by their names in its module."""


class ServedHead:
    """A module of which members bring trained copies, e.g. ``classifier``.

    Rows of members with fewer outputs than others of the batch are filled up with ``-inf``.
    """

    def __init__(self, head: nn.Module) -> None:
        self._plain = copy.deepcopy(head)  # without the hook
        self.active: list[tuple[State, Tensor | None]] | None = None
        """States, and the rows of the batch that each is for; none: all."""
        self._handle = head.register_forward_hook(self._hook)
        self._head = head

    def release(self) -> None:
        """Leave the module as it was."""
        self._handle.remove()

    def activate(self, states: Sequence[State | None], which: Sequence[int]) -> None:
        """Set the rows of the next forwards.

        Args:
            states: Of the batch's members; none: the member has no such head.
            which: Member of each row, -1 for the base model.
        """
        reference = next(self._head.parameters())
        found: list[tuple[State, Tensor | None]] = []
        for i, state in enumerate(states):
            rows = [row for row, member in enumerate(which) if member == i]
            if state is not None and rows:
                found.append((state, torch.tensor(rows, device=reference.device)))
        self.active = found or None

    def _hook(self, head: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self.active is None:
            return None
        if self.active[0][1] is None:
            return self._called(self.active[0][0], args[0])
        parts = [(self._called(state, args[0][rows]), rows) for state, rows in self.active if rows is not None]
        width = max(output.shape[-1], *(part.shape[-1] for part, _ in parts))
        found = _filled(output, width)
        for part, rows in parts:
            found = found.index_copy(0, rows, _filled(part, width))
        return found

    def _called(self, state: State, x: Tensor) -> Tensor:
        found: Tensor = functional_call(self._plain, {name: tensor.to(x) for name, tensor in state.items()}, (x,))
        return found


def _filled(output: Tensor, width: int) -> Tensor:
    return nn.functional.pad(output, (0, width - output.shape[-1]), value=float("-inf"))
