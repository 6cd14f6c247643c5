"""Task heads of members: each row of a batch goes through its own member's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from adapterbank.errors import BankError
from adapterbank.runtime.batch import check_rows
from adapterbank.runtime.layer import COMPUTE, device_of, hooked

State = Mapping[str, Tensor]
"""Tensors of a head by their names in its module."""


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """What the rows of a batch need at one head."""

    batch: int
    """Rows of the batch."""
    parts: list[tuple[State, Tensor]]
    """States, and the rows that each is for."""


class ServedHead:
    """A module of which members bring trained copies, e.g. ``classifier``.

    Rows of members with fewer outputs than others of the batch are filled up with ``-inf``.
    """

    def __init__(self, head: nn.Module) -> None:
        self.head = head
        self.active: _Parts | State | None = None
        """One state: it is for all rows."""
        self._handle = hooked(head, self._hook)

    def release(self) -> None:
        """Leave the module as it was."""
        self._handle.remove()

    def activate(self, states: Sequence[State | None], which: Sequence[int]) -> None:
        """Set the rows of the next forwards.

        Args:
            states: Of the batch's members; none: the member has no such head.
            which: Member of each row, -1 for the base model.
        """
        parts: list[tuple[State, Tensor]] = []
        for i, state in enumerate(states):
            rows = [row for row, member in enumerate(which) if member == i]
            if state is not None and rows:
                parts.append((self._placed(state), torch.tensor(rows, device=device_of(self.head))))
        self.active = _Parts(batch=len(which), parts=parts) if parts else None

    def activate_for_all(self, state: State) -> None:
        """Set one state for all rows of the next forwards, however many there are."""
        self.active = self._placed(state)

    def _placed(self, state: State) -> State:
        """Where the head is by now, in its type.

        Raises:
            BankError: If it is quantised.
        """
        device, types = device_of(self.head), {name: getattr(self.head, name).dtype for name in state}
        if not all(dtype in COMPUTE for dtype in types.values()):
            raise BankError(
                f"{type(self.head).__name__}, a head of members, is quantised; load the base with it as it is"
            )
        return {name: tensor.to(device, types[name]) for name, tensor in state.items()}

    def _hook(self, head: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        active = self.active
        if active is None:
            return None
        self.active = None  # the head is called again below
        try:
            if isinstance(active, _Parts):
                return self._by_rows(active, args[0], output)
            return self._called(active, args[0])
        finally:
            self.active = active

    def _by_rows(self, active: _Parts, x: Tensor, output: Tensor) -> Tensor:
        # beams of a row follow each other; an embedding's input has no features
        each = check_rows(len(x), active.batch)
        places = [rows for _, rows in active.parts]
        if each > 1:
            places = [(rows[:, None] * each + torch.arange(each, device=rows.device)).flatten() for rows in places]
        found = [self._called(state, x[rows]) for (state, _), rows in zip(active.parts, places, strict=True)]
        width = max(output.shape[-1], *(part.shape[-1] for part in found))
        output = _filled(output, width)
        for part, rows in zip(found, places, strict=True):
            output = output.index_copy(0, rows, _filled(part, width))
        return output

    def _called(self, state: State, x: Tensor) -> Tensor:
        found: Tensor = functional_call(self.head, dict(state), (x,))
        return found


def _filled(output: Tensor, width: int) -> Tensor:
    return nn.functional.pad(output, (0, width - output.shape[-1]), value=float("-inf"))
