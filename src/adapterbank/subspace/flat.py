"""EigenLoRA's flat variant: each factor is one long vector, each adapter ``k`` numbers per factor (spec.md 2.6).

Components are LoRA-shaped, so a basis takes ``k r d`` values per factor where the row basis takes ``k d``. A and B mix
separately, which makes the update bilinear in the coefficients; ``fit_flat_joint`` shares one vector between them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from adapterbank.errors import BankError
from adapterbank.subspace.eigenlora import Mean, RowBasis, fit_rows


@dataclass(frozen=True, kw_only=True, eq=False)
class FlatBasis:
    """Basis of one factor whose components have the factor's own shape: ``k`` experts to mix."""

    rows: RowBasis
    """The basis of the flattened factors."""
    shape: tuple[int, int]
    """``(r, d)`` of the factor."""

    @property
    def experts(self) -> Float[Tensor, "k r d"]:
        """The components as factors: a reconstruction is ``mean + sum_k a_k experts[k]``."""
        return self.rows.components.view(-1, *self.shape)

    def project(self, factors: Float[Tensor, "n r d"]) -> Float[Tensor, "n k"]:
        """Least-squares coefficients of whole factors.

        Raises:
            BankError: If a factor has another shape.
        """
        if tuple(factors.shape[1:]) != self.shape:
            raise BankError(f"a factor of shape {tuple(factors.shape[1:])} doesn't fit a flat basis of {self.shape}")
        return self.rows.project(factors.flatten(1))

    def reconstruct(self, coefficients: Float[Tensor, "n k"]) -> Float[Tensor, "n r d"]:
        """Whole factors from ``k`` numbers each."""
        return self.rows.reconstruct(coefficients).view(-1, *self.shape)


def fit_flat(factors: Float[Tensor, "n r d"], k: int, mean: Mean = "affine") -> FlatBasis:
    """PCA of flattened factors.

    Args:
        factors: All ``A`` of one module, or all ``B.T``, of one rank; see ``align_ranks``.
        k: Components, at most ``n - 1`` with a mean.
        mean: See ``eigenlora.RowStack``.

    Raises:
        BankError: If ``k`` is outside the rank bound.
    """
    _, r, d = factors.shape
    return FlatBasis(rows=fit_rows(factors.flatten(1), k, mean), shape=(r, d))


@dataclass(frozen=True, kw_only=True, eq=False)
class JointFlatBasis:
    """Basis of whole adapters: one coefficient vector moves A and B together. Our extension."""

    rows: RowBasis
    """The basis of the concatenated flattened factors."""
    shapes: tuple[tuple[int, int], tuple[int, int]]
    """``(r, d_in)`` and ``(r, d_out)``."""

    def project(self, A: Float[Tensor, "n r d_in"], B_T: Float[Tensor, "n r d_out"]) -> Float[Tensor, "n k"]:
        """Least-squares coefficients of the pairs."""
        return self.rows.project(torch.cat([A.flatten(1), B_T.flatten(1)], dim=1))

    def reconstruct(
        self, coefficients: Float[Tensor, "n k"]
    ) -> tuple[Float[Tensor, "n r d_in"], Float[Tensor, "n r d_out"]]:
        """All ``A`` and all ``B.T``."""
        (r, d_in), (_, d_out) = self.shapes
        flat = self.rows.reconstruct(coefficients)
        return flat[:, : r * d_in].reshape(-1, r, d_in), flat[:, r * d_in :].reshape(-1, r, d_out)


def fit_flat_joint(
    A: Float[Tensor, "n r d_in"], B_T: Float[Tensor, "n r d_out"], k: int, mean: Mean = "affine"
) -> JointFlatBasis:
    """PCA of whole flattened adapters: ``k`` numbers per module instead of ``2 k``.

    Raises:
        BankError: If ``k`` is outside the rank bound.
    """
    rows = torch.cat([A.flatten(1), B_T.flatten(1)], dim=1)
    shapes = ((A.shape[1], A.shape[2]), (B_T.shape[1], B_T.shape[2]))
    return JointFlatBasis(rows=fit_rows(rows, k, mean), shapes=shapes)


def align_ranks(factors: Sequence[Float[Tensor, "_ d"]], *, pad: bool = False) -> Float[Tensor, "n r d"]:
    """Stack factors for a flat fit, which needs one rank.

    Args:
        factors: All ``A`` of one module, or all ``B.T``.
        pad: Consent to fill smaller ranks with zero rows. It changes the fit: row ``j`` of one adapter is compared with
            row ``j`` of another.

    Raises:
        BankError: If the ranks differ and ``pad`` isn't set.
    """
    ranks = [len(factor) for factor in factors]
    if len(set(ranks)) > 1 and not pad:
        raise BankError(f"a flat basis needs one rank, not {sorted(set(ranks))}; set pad=True to fill with zero rows")
    filled = [torch.nn.functional.pad(factor, (0, 0, 0, max(ranks) - len(factor))) for factor in factors]
    return torch.stack(filled)


def basis_bytes(k: int, r: int, d: int, *, itemsize: int = 4) -> int:
    """Bytes of one factor's flat basis: ``r`` times those of a row basis, which is what limits ``k``."""
    return k * r * d * itemsize
