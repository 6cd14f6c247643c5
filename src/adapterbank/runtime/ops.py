"""What rows of a batch with different adapters compute at one linear layer: pure functions of tensors.

``m`` rows with ``t`` tokens each; ``r`` is the largest rank among them, smaller ones are padded with zeros.
"""

import warnings

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def through_basis(
    x: Float[Tensor, "m t d_in"],
    V: Float[Tensor, "k_in d_in"],
    U: Float[Tensor, "d_out k_out"],
    coef_A: Float[Tensor, "m r k_in"],
    coef_B: Float[Tensor, "m k_out r"],
) -> Float[Tensor, "m t d_out"]:
    """Semantics: ``y[i] = x[i] @ V.T @ coef_A[i].T @ coef_B[i].T @ U.T``.

    The two large products are dense and the same for all rows; only ``r (k_in + k_out)`` numbers a row differ.
    """
    inside = F.linear(x, V)  # (m, t, k_in)
    inside = inside @ coef_A.mT @ coef_B.mT  # (m, t, k_out)
    return F.linear(inside, U)


def through_factors(
    x: Float[Tensor, "m t d_in"], A: Float[Tensor, "m r d_in"], B: Float[Tensor, "m d_out r"]
) -> Float[Tensor, "m t d_out"]:
    """Semantics: ``y[i] = x[i] @ A[i].T @ B[i].T``."""
    product: Tensor = x @ A.mT @ B.mT
    return product


def through_both(
    x: Float[Tensor, "m t d_in"],
    V: Float[Tensor, "k_in d_in"],
    U: Float[Tensor, "d_out k_out"],
    coef_A: Float[Tensor, "m r k_in"],
    coef_B: Float[Tensor, "m k_out r"],
    private_A: Float[Tensor, "m r d_in"],
    private_B: Float[Tensor, "m d_out r"],
) -> Float[Tensor, "m t d_out"]:
    """Semantics: :func:`through_factors` of ``coef_A[i] @ V + private_A[i]`` and ``U @ coef_B[i] + private_B[i]``."""
    inside = F.linear(x, V) @ coef_A.mT + x @ private_A.mT  # (m, t, r)
    product: Tensor = F.linear(inside @ coef_B.mT, U) + inside @ private_B.mT
    return product


def built(
    V: Float[Tensor, "k_in d_in"],
    U: Float[Tensor, "d_out k_out"],
    coef_A: Float[Tensor, "m r k_in"],
    coef_B: Float[Tensor, "m k_out r"],
) -> tuple[Float[Tensor, "m r d_in"], Float[Tensor, "m d_out r"]]:
    """Semantics: ``A[i] = coef_A[i] @ V``, ``B[i] = U @ coef_B[i]``."""
    return coef_A @ V, U @ coef_B


def compressed(
    positions: Int[Tensor, " nnz"], values: Float[Tensor, " nnz"], shape: tuple[int, int]
) -> Float[Tensor, "d_out d_in"]:
    """A sparse matrix by rows, where the device multiplies such; else a dense one.

    Args:
        positions: Flat, ascending.
        values: There.
        shape: ``(d_out, d_in)``.
    """
    rows, columns = shape
    if positions.device.type not in ("cpu", "cuda"):
        dense = values.new_zeros(rows * columns)
        return dense.index_copy_(0, positions.long(), values).view(shape)
    starts = torch.arange(rows + 1, device=positions.device, dtype=positions.dtype) * columns
    ends = torch.searchsorted(positions, starts).to(positions.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the format new
        return torch.sparse_csr_tensor(ends, positions % columns, values, shape, check_invariants=False)


def through_sparse(x: Float[Tensor, "m t d_in"], S: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "m t d_out"]:
    """Semantics: ``y[i] = x[i] @ S.T``, in the type of ``S``.

    A token costs as many products as ``S`` has values: a hundredth of the base layer's at a density of 1 %.
    """
    if torch.is_autocast_enabled(x.device.type):  # torch has no sparse product in its types
        with torch.autocast(x.device.type, enabled=False):
            return through_sparse(x, S)
    found: Tensor = S @ x.reshape(-1, x.shape[-1]).to(S.dtype).T
    # contiguous, as adding it to rows would otherwise go through it column by column
    return found.T.contiguous().view(*x.shape[:-1], -1)


def crossover(k: int, r: int) -> float:
    """Tokens a row from which building its factors is cheaper than the way through the basis: ``k r / (k - r)``.

    A token costs ``k (d_in + d_out)`` products through the basis and ``r (d_in + d_out)`` through factors, whose
    building costs ``k r (d_in + d_out)``. Never cheaper where ``r >= k``.
    """
    return k * r / (k - r) if k > r else float("inf")
