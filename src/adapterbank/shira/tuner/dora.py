"""SHiRA-DoRA: at a mask's positions the weight becomes that of a DoRA (SHiRA, table 2; DoRA, arXiv:2402.09353)."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from adapterbank.shira.sampling import row_slices
from adapterbank.shira.tuner.ops import WRITING


class MaskedDora(nn.Module):
    """``W' = W + M o (magnitude * (W + B A) / ||W + B A|| - W)``, with norms over the inputs of each output.

    At the start ``B`` is zero and the magnitudes are the norms of ``W``, so that ``W'`` is ``W``. The norms are
    constants to the gradient (DoRA, 4.3), as in PEFT.
    """

    def __init__(self, weight: Float[Tensor, "rows columns"], rank: int, *, transposed: bool) -> None:
        """Begin as the base weight.

        Args:
            weight: ``(d_out, d_in)``; with ``transposed`` ``(d_in, d_out)``, as GPT-2's Conv1D has it.
            rank: Of ``B A``; no more than the weight can have is taken.
            transposed: Which way the weight is stored.
        """
        super().__init__()
        d_in, d_out = weight.shape if transposed else weight.shape[::-1]
        rank = min(rank, d_in, d_out)
        self.transposed = transposed
        self.A = nn.Parameter(torch.empty(rank, d_in, device=weight.device))
        self.B = nn.Parameter(torch.zeros(d_out, rank, device=weight.device))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)
        nowhere = torch.zeros(0, dtype=torch.int32, device=weight.device)
        _, _, norms = entries(weight.detach(), self.A.detach(), self.B.detach(), nowhere, transposed)
        self.magnitude = nn.Parameter(norms)

    def forward(self, weight: Float[Tensor, "rows columns"], positions: Int[Tensor, " nnz"]) -> Float[Tensor, " nnz"]:
        """What is added to the weight at the positions."""
        base, low, norms = entries(weight, self.A, self.B, positions, self.transposed)
        columns = weight.shape[1]
        output = positions.long() % columns if self.transposed else positions.long() // columns
        # a weight of zeros has a norm of zero, and a magnitude of zero
        ratio = (self.magnitude / norms.detach().clamp_min(torch.finfo(norms.dtype).tiny))[output]
        values: Tensor = (ratio - 1) * base + ratio * low
        return values


@torch.library.custom_op("adapterbank::dora_entries", mutates_args=())
def entries(weight: Tensor, A: Tensor, B: Tensor, positions: Tensor, transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Semantics: ``W.view(-1)[positions]``, ``(B A).view(-1)[positions]`` and the norms of ``W + B A``, in float32.

    Slice by slice: neither ``B A`` nor a copy of the weight is ever whole.

    Args:
        weight: ``(d_out, d_in)``; with ``transposed`` ``(d_in, d_out)``.
        A: ``(r, d_in)``.
        B: ``(d_out, r)``.
        positions: ``(nnz,)``, flat positions in ``weight``, ascending.
        transposed: Which way the weight is stored.
    """
    left, right = _as_stored(A, B, transposed)
    base, low = (torch.empty(len(positions), device=weight.device) for _ in range(2))
    squares = torch.zeros(len(B), device=weight.device)
    with torch.autocast(weight.device.type, enabled=False), WRITING:
        for rows, cut, inside in row_slices(weight.shape, positions):
            slice_of_weight, product = weight[rows].float(), left[rows] @ right
            base[cut], low[cut] = slice_of_weight.view(-1)[inside], product.view(-1)[inside]
            both = (slice_of_weight + product).square_()
            if transposed:
                squares += both.sum(0)
            else:
                squares[rows] = both.sum(1)
    return base, low, squares.sqrt_()


@entries.register_fake
def _(weight: Tensor, A: Tensor, B: Tensor, positions: Tensor, transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
    return A.new_empty(len(positions)).float(), A.new_empty(len(positions)).float(), A.new_empty(len(B)).float()


@torch.library.custom_op("adapterbank::dora_entries_backward", mutates_args=())
def entries_backward(
    g: Tensor, A: Tensor, B: Tensor, positions: Tensor, shape: list[int], transposed: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of ``A`` and ``B`` from that of ``(B A).view(-1)[positions]``."""
    left, right = _as_stored(A, B, transposed)
    rows = positions.long() // shape[1]
    places = torch.stack([rows, positions.long() - rows * shape[1]])
    with torch.autocast(g.device.type, enabled=False):
        sparse = torch.sparse_coo_tensor(places, g.float(), shape, is_coalesced=True, check_invariants=False)
        of_left, of_right = torch.sparse.mm(sparse, right.T), torch.sparse.mm(sparse.T, left).T
    of_A, of_B = (of_left.T, of_right.T) if transposed else (of_right, of_left)
    return of_A.to(A.dtype).contiguous(), of_B.to(B.dtype).contiguous()


@entries_backward.register_fake
def _(g: Tensor, A: Tensor, B: Tensor, positions: Tensor, shape: list[int], transposed: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(A), torch.empty_like(B)


def _as_stored(A: Tensor, B: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """Factors whose product lies as the weight does."""
    return (A.T.float(), B.T.float()) if transposed else (B.float(), A.float())


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    weight, A, B, positions, ctx.transposed = inputs
    ctx.shape, ctx.dtype = list(weight.shape), weight.dtype
    ctx.save_for_backward(A, B, positions)


def _backward(ctx: Any, g_base: Tensor, g_low: Tensor, g_norms: Tensor | None) -> tuple[Tensor | None, ...]:
    A, B, positions = ctx.saved_tensors
    of_weight = None
    if ctx.needs_input_grad[0]:
        rows, columns = ctx.shape
        of_weight = g_base.new_zeros(rows * columns).index_add(0, positions.long(), g_base)
        of_weight = of_weight.view(rows, columns).to(ctx.dtype)
    return of_weight, *entries_backward(g_low, A, B, positions, ctx.shape, ctx.transposed), None, None


entries.register_autograd(_backward, setup_context=_save)
