"""One linear layer of a running model: a hook that adds, to each row of a batch, the update of that row's adapter."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adapterbank.errors import BankError
from adapterbank.runtime import ops
from adapterbank.runtime.batch import Rows, by_row
from adapterbank.runtime.members import LayerBasis, Member
from adapterbank.runtime.packing import Packed

COMPUTE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Types that updates are computed in."""


def device_of(layer: nn.Module) -> torch.device | None:
    """Where a layer is by now; none: it has no values."""
    tensors = (tensor for tensor in (*layer.parameters(), *layer.buffers()) if not tensor.is_meta)
    return next((tensor.device for tensor in tensors), None)


def is_conv1d(layer: nn.Module) -> bool:
    """Whether a layer keeps its weight as ``(d_in, d_out)``, as GPT-2's Conv1D does."""
    return hasattr(layer, "nf")


def hooked(layer: nn.Module, hook: Callable[..., Tensor | None]) -> RemovableHandle:
    """Register a forward hook, also with a model that was compiled and called before."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # compiled code doesn't look for new hooks, and would go on without them
    return layer.register_forward_hook(hook)


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
        self._handle = hooked(layer, self._hook)

    def release(self) -> None:
        """Leave the layer as it was."""
        self._handle.remove()

    @property
    def bytes(self) -> int:
        """Of the shared directions."""
        return self.V.nbytes + self.U.nbytes

    def activate(self, rows: Rows | None) -> None:
        """Set the rows of the next forwards."""
        if rows is None:
            self.active = None
            return
        device = device_of(self.layer) or self.V.device
        self.V, self.U = self.V.to(device), self.U.to(device)  # wherever the model is by now
        self.active = rows.to(device, self.dtype)

    # --- forward ----------------------------------------------------------------------------------------------------

    def _hook(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        rows = self.active
        if rows is None:
            return None
        seen, found = by_row(args[0], rows.batch), by_row(output, rows.batch)
        if rows.places is None:
            return (found + self.update(seen, rows).to(output.dtype)).view(output.shape)
        delta = self.update(seen[rows.places], rows).to(output.dtype)
        # not a sum over all: rows of the base model stay as they are, to the bit
        return found.index_add(0, rows.places, delta).view(output.shape)

    def update(self, x: Float[Tensor, "m t d_in"], rows: Rows) -> Float[Tensor, "m t d_out"]:
        """Of the rows that have one."""
        x, (k, r) = x.to(self.dtype), (max(len(self.V), self.U.shape[1]), rows.coef_A.shape[1])
        most = ops.crossover(k, r) if self.crossover is None else self.crossover
        if not rows.private:
            if x.shape[1] < most:
                return ops.through_basis(x, self.V, self.U, rows.coef_A, rows.coef_B)
            return ops.through_factors(x, *ops.built(self.V, self.U, rows.coef_A, rows.coef_B))
        private_A, private_B = self._private(rows)
        if x.shape[1] < most:
            return ops.through_both(x, self.V, self.U, rows.coef_A, rows.coef_B, private_A, private_B)
        A, B = ops.built(self.V, self.U, rows.coef_A, rows.coef_B)
        return ops.through_factors(x, A + private_A, B + private_B)

    def _private(self, rows: Rows) -> tuple[Float[Tensor, "m r d_in"], Float[Tensor, "m d_out r"]]:
        """Remainders, unpacked for this step only: of all layers together they're as large as the adapters."""
        r = rows.coef_A.shape[1]
        A = self._unpacked([None if part is None else part.A for part in rows.private], r, self.V.shape[1])
        B = self._unpacked([None if part is None else part.B for part in rows.private], r, self.U.shape[0])
        return A, B.mT

    def _unpacked(self, matrices: Sequence[Packed | None], r: int, width: int) -> Float[Tensor, "m r width"]:
        alike = [matrix for matrix in matrices if matrix is not None and len(matrix.codes) == r]
        if len(alike) == len(matrices):
            return Packed.stacked(alike).to(self.V.device).unpacked(self.dtype)
        found = torch.zeros(len(matrices), r, width, dtype=self.dtype, device=self.V.device)
        for place, matrix in zip(found, matrices, strict=True):
            if matrix is not None:
                place[: len(matrix.codes)] = matrix.to(self.V.device).unpacked(self.dtype)
        return found

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

    def dense(self, name: str, member: Member) -> Tensor:
        """A member's update as the base layer stores its weight: ``(d_out, d_in)``, of GPT-2's Conv1D the reverse.

        Args:
            name: Of this layer in the model.
            member: That changes it.
        """
        A, B = member.factors(name, self.basis)
        update = B @ A
        return update.T if is_conv1d(self.layer) else update
