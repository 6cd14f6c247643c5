"""One linear layer of a running model: a hook that adds, to each row of a batch, the update of that row's adapter."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from adapterbank.errors import AdapterBankError, BankError
from adapterbank.runtime import ops
from adapterbank.runtime.members import LayerBasis, Part
from adapterbank.runtime.packing import Packed

COMPUTE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Types that updates are computed in."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """What the rows of a batch need at one layer; ``m`` of them have an update here, of rank ``r`` or less."""

    batch: int
    """Rows of the batch."""
    places: Int[Tensor, " m"] | None
    """Which of them; none: all."""
    coef_A: Float[Tensor, "m r k_in"]
    coef_B: Float[Tensor, "m k_out r"]
    members: Int[Tensor, " m"]
    """Whose each row is, among the parts."""
    private_A: tuple[Packed | None, ...]
    """Remainders of the parts; empty if there are none at all."""
    private_B: tuple[Packed | None, ...]


class ServedLayer:
    """A linear layer whose output gets each row's update added.

    Args:
        layer: The base layer; it is called and never read, so it may be quantised.
        basis: What all rows share.
        dtype: That updates are computed in.
        crossover: Tokens a row from which factors are built; by default :func:`ops.crossover` of the batch's rank.
    """

    def __init__(self, layer: nn.Module, basis: LayerBasis, dtype: torch.dtype, crossover: float | None) -> None:
        self.layer, self.basis, self.dtype, self.crossover = layer, basis, dtype, crossover
        self.V, self.U = basis.V.to(dtype), basis.U.to(dtype)
        self.active: Rows | None = None
        self._handle = layer.register_forward_hook(self._hook)

    def release(self) -> None:
        """Leave the layer as it was."""
        self._handle.remove()

    @property
    def bytes(self) -> int:
        """Of the shared directions."""
        return self.V.nbytes + self.U.nbytes

    # --- which rows -------------------------------------------------------------------------------------------------

    def activate(self, parts: Sequence[Part | None], which: Sequence[int]) -> None:
        """Set the rows of the next forwards.

        Args:
            parts: Of the batch's members at this layer; none: the member changes nothing here.
            which: Member of each row, -1 for the base model.
        """
        present = [(part, i) for i, part in enumerate(parts) if part is not None and part.rank]
        places = [row for row, i in enumerate(which) if i >= 0 and (part := parts[i]) is not None and part.rank]
        if not places:
            self.active = None
            return
        device = self._device()
        self.V, self.U = self.V.to(device), self.U.to(device)  # wherever the model is by now
        order = {i: place for place, (_, i) in enumerate(present)}
        members = torch.tensor([order[which[row]] for row in places], device=device)
        found = [part for part, _ in present]
        coef_A = self._stacked([part.coef_A for part in found], device)[members]
        coef_B = self._stacked([part.coef_B for part in found], device)[members]
        private = any(part.private_A is not None or part.private_B is not None for part in found)
        self.active = Rows(
            batch=len(which),
            places=None if len(places) == len(which) else torch.tensor(places, device=device),
            coef_A=coef_A,
            coef_B=coef_B.mT.contiguous(),
            members=members,
            private_A=tuple(part.private_A for part in found) if private else (),
            private_B=tuple(part.private_B for part in found) if private else (),
        )

    def _device(self) -> torch.device:
        tensors = [t for t in (*self.layer.parameters(), *self.layer.buffers()) if not t.is_meta]
        return tensors[0].device if tensors else self.V.device

    def _stacked(self, matrices: Sequence[Packed], device: torch.device) -> Float[Tensor, "n r _"]:
        """Unpacked, padded to one rank."""
        return nn.utils.rnn.pad_sequence([m.unpacked() for m in matrices], batch_first=True).to(device, self.dtype)

    # --- forward ----------------------------------------------------------------------------------------------------

    def _hook(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        rows = self.active
        if rows is None:
            return None
        x: Tensor = args[0]
        if x.shape[0] % rows.batch:
            raise AdapterBankError(
                f"a layer sees {x.shape[0]} rows in a batch of {rows.batch} adapters; give one name for every row"
            )
        # beams of one row, and tokens where a model flattens them, follow each other
        seen = x.reshape(rows.batch, -1, x.shape[-1])
        found = output.reshape(rows.batch, -1, output.shape[-1])
        if rows.places is None:
            return (found + self.update(seen, rows).to(output.dtype)).view(output.shape)
        delta = self.update(seen[rows.places], rows).to(output.dtype)
        # not a sum over all: rows of the base model stay as they are, to the bit
        return found.index_add(0, rows.places, delta).view(output.shape)

    def update(self, x: Float[Tensor, "m t d_in"], rows: Rows) -> Float[Tensor, "m t d_out"]:
        """Of the rows that have one."""
        x, (k, r) = x.to(self.dtype), (max(len(self.V), self.U.shape[1]), rows.coef_A.shape[1])
        most = ops.crossover(k, r) if self.crossover is None else self.crossover
        if not rows.private_A:
            if x.shape[1] < most:
                return ops.through_basis(x, self.V, self.U, rows.coef_A, rows.coef_B)
            return ops.through_factors(x, *ops.built(self.V, self.U, rows.coef_A, rows.coef_B))
        private_A = self._private(rows.private_A, rows, x.shape[-1])
        private_B = self._private(rows.private_B, rows, self.U.shape[0]).mT
        if x.shape[1] < most:
            return ops.through_both(x, self.V, self.U, rows.coef_A, rows.coef_B, private_A, private_B)
        A, B = ops.built(self.V, self.U, rows.coef_A, rows.coef_B)
        return ops.through_factors(x, A + private_A, B + private_B)

    def weight(self) -> Tensor:
        """The base layer's, to be changed in place.

        Raises:
            BankError: If it is quantised.
        """
        weight = getattr(self.layer, "weight", None)
        if not isinstance(weight, Tensor) or weight.dtype not in COMPUTE:
            raise BankError(
                f"{type(self.layer).__name__} is quantised, so nothing can be merged into it; serve by rows"
            )
        return weight

    def dense(self, part: Part) -> Tensor:
        """A member's update as the base layer stores its weight: ``(d_out, d_in)``, of GPT-2's Conv1D the reverse."""
        A, B = part.factors(self.basis)
        update = B @ A
        return update if isinstance(self.layer, nn.Linear) else update.T

    def _private(self, parts: tuple[Packed | None, ...], rows: Rows, width: int) -> Float[Tensor, "m r width"]:
        """Unpacked for this step only: of all layers together they're as large as the adapters."""
        r, device = rows.coef_A.shape[1], rows.coef_A.device
        found = torch.zeros(len(parts), r, width, dtype=self.dtype, device=device)
        for place, packed in zip(found, parts, strict=True):
            if packed is not None:
                place[: len(packed.codes)] = packed.unpacked().to(device, self.dtype)
        return found[rows.members]
