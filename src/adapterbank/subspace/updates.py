"""One low-rank update ``dW = scale * B @ A`` by its thin SVD, without ever forming the ``d_out x d_in`` matrix."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from adapterbank.errors import BankError


@dataclass(frozen=True, kw_only=True, eq=False)
class ThinUpdate:
    """The thin SVD ``dW = U @ diag(S) @ Vh`` of one update; independent of gauge, alpha and rsLoRA."""

    U: Float[Tensor, "d_out r"]
    """Output directions, orthonormal columns."""
    S: Float[Tensor, " r"]
    """Singular values, descending, with the scale folded in."""
    Vh: Float[Tensor, "r d_in"]
    """Input directions, orthonormal rows; the entry of largest magnitude of each is positive."""


def thin_svd(A: Float[Tensor, "r d_in"], B: Float[Tensor, "d_out r"], scale: float = 1.0) -> ThinUpdate:
    """Thin SVD of ``scale * B @ A`` through two QRs and one small SVD.

    Zero and rank-deficient updates are legal: their null directions are orthonormal too, with ``S = 0``.

    Args:
        A: Input factor; 16-bit floats are computed in float32.
        B: Output factor.
        scale: ``alpha / r`` or ``alpha / sqrt(r)``; may be zero or negative.

    Returns:
        ``min(r, d_in, d_out)`` singular triples: ``r`` of them unless the rank exceeds a side.

    Raises:
        BankError: If a number of the factors or of the update isn't finite.
    """
    A, B = _wide(A), _wide(B)
    # QR, not r x r Grams: as fast (0.2 ms at d=1024, r=16) and it keeps directions below 1e-4 of the first
    Q_in, R_in = torch.linalg.qr(A.T)  # (d_in, p), (p, r)
    Q_out, R_out = torch.linalg.qr(B)  # (d_out, q), (q, r)
    core = scale * (R_out.double() @ R_in.double().T)  # (q, p)
    if not torch.isfinite(core.to(A.dtype)).all():
        raise BankError("an update holds nan or inf, or overflows: its singular vectors don't exist; drop the adapter")
    # float64 costs nothing at this size and keeps close singular values in order
    u, S, vh = torch.linalg.svd(core, full_matrices=False)
    Vh = vh.to(A.dtype) @ Q_in.T
    sign = leading_sign(Vh)
    return ThinUpdate(U=(Q_out @ u.to(B.dtype)) * sign, S=S.to(A.dtype), Vh=Vh * sign[:, None])


def leading_sign(rows: Float[Tensor, "k d"]) -> Float[Tensor, " k"]:
    """Sign of each row's entry of largest magnitude: an SVD is unique only up to these."""
    lead = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True)).squeeze(1)
    return torch.where(lead < 0, -1.0, 1.0).to(rows.dtype)


def update_norm(A: Float[Tensor, "r d_in"], B: Float[Tensor, "d_out r"], scale: float = 1.0) -> float:
    """Frobenius norm of ``scale * B @ A`` from two ``r x r`` Grams: ``||BA||^2 = <A A^T, B^T B>``.

    Args:
        A: Input factor.
        B: Output factor.
        scale: Factor of the update.
    """
    # float64: the Grams square the condition number
    A, B = A.double(), B.double()
    square = ((A @ A.T) * (B.T @ B)).sum().clamp_min(0)
    return abs(scale) * float(square.sqrt())


def balanced(update: ThinUpdate) -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"]]:
    """Factors ``A = sqrt(S) Vh``, ``B = U sqrt(S)`` with scale 1: one pair per update, whatever gauge it came in."""
    root = update.S.sqrt()
    return root[:, None] * update.Vh, update.U * root


def truncate(update: ThinUpdate, r: int) -> ThinUpdate:
    """The ``r`` leading singular triples, or all: the best update of that rank (Eckart-Young)."""
    return ThinUpdate(U=update.U[:, :r], S=update.S[:r], Vh=update.Vh[:r])


def difference_norm(update: ThinUpdate, A: Float[Tensor, "p d_in"], B: Float[Tensor, "d_out p"]) -> float:
    """``||dW - B @ A||_F`` as the norm of one update of rank ``r + p``."""
    # float64 throughout: the two nearly cancel, and 1 - captured energy would stop at 3e-4
    wide_A = torch.cat([update.Vh.double(), A.double()])
    wide_B = torch.cat([(update.U * update.S).double(), -B.double()], dim=1)
    return update_norm(wide_A, wide_B)


def relative_error(update: ThinUpdate, A: Float[Tensor, "p d_in"], B: Float[Tensor, "d_out p"]) -> float:
    """``||dW - B @ A||_F / ||dW||_F``, the error that counts; for a zero update 0 or, if ``B @ A`` isn't, infinity."""
    norm = float(torch.linalg.vector_norm(update.S, dtype=torch.float64))
    lost = difference_norm(update, A, B)
    if norm == 0:
        return 0.0 if lost == 0 else float("inf")
    return lost / norm


def _wide(factor: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
    # torch has no 16-bit QR, and 8 bits of mantissa would blur the directions
    return factor if factor.dtype == torch.float64 else factor.float()
