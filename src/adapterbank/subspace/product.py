"""The default fit: one input basis ``V`` and one output basis ``U`` for the updates themselves, not for A and B."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from adapterbank.errors import BankError
from adapterbank.subspace.moments import SecondMoment
from adapterbank.subspace.updates import ThinUpdate


@dataclass(frozen=True, kw_only=True, eq=False)
class ProductBasis:
    """Bases of one module: ``dW ~ U @ core @ V``."""

    V: Float[Tensor, "k_in d_in"]
    """Input basis, orthonormal rows."""
    U: Float[Tensor, "d_out k_out"]
    """Output basis, orthonormal columns."""
    eigenvalues_in: Float[Tensor, " q_in"]
    """Weighted energy per input direction, descending; at least ``k_in`` of them."""
    eigenvalues_out: Float[Tensor, " q_out"]
    """Weighted energy per output direction, descending; at least ``k_out`` of them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Coefficients:
    """One update in a product basis: ``A' = coef_A @ V``, ``B' = U @ coef_B``."""

    coef_A: Float[Tensor, "r k_in"]
    coef_B: Float[Tensor, "k_out r"]

    @property
    def core(self) -> Float[Tensor, "k_out k_in"]:
        """The pair as one matrix: smaller than both where ``r`` exceeds ``harmonic_size``."""
        return self.coef_B @ self.coef_A


def fit_product(
    updates: Sequence[ThinUpdate],
    k_in: int,
    k_out: int,
    *,
    weights: Sequence[float] | None = None,
    hooi_sweeps: int = 0,
) -> ProductBasis:
    """Leading eigenvectors of ``sum w^2 dW^T dW`` and ``sum w^2 dW dW^T``: the truncated HOSVD, uncentred.

    De Lathauwer, De Moor, Vandewalle 2000, with the mode over adapters left whole. Each HOOI sweep (their second paper
    of that year) refits either side to what the other keeps, and never lowers the captured energy.

    Args:
        updates: Updates of one module, any ranks.
        k_in: Input directions.
        k_out: Output directions.
        weights: ``w`` per update; ``1 / ||dW||`` by default, so that no adapter is sacrificed to a louder one.
        hooi_sweeps: Alternating refits after the HOSVD; two are nearly always enough.

    Raises:
        BankError: If there are no updates, or ``k_in`` or ``k_out`` is outside the rank bound.
    """
    if not updates:
        raise BankError("no updates to fit a basis on")
    w = equal_weights(updates) if weights is None else list(weights)
    rows_in = [input_rows(update, weight) for update, weight in zip(updates, w, strict=True)]
    rows_out = [output_rows(update, weight) for update, weight in zip(updates, w, strict=True)]
    V, values_in = _leading(rows_in, k_in)
    U_rows, values_out = _leading(rows_out, k_out)
    for _ in range(hooi_sweeps):
        kept = [_kept_rows(U_rows @ update.U, rows) for update, rows in zip(updates, rows_in, strict=True)]
        V, values_in = _leading(kept, k_in, spare=rows_in)
        kept = [_kept_rows(V @ update.Vh.T, rows) for update, rows in zip(updates, rows_out, strict=True)]
        U_rows, values_out = _leading(kept, k_out, spare=rows_out)
    return ProductBasis(V=V, U=U_rows.T, eigenvalues_in=values_in, eigenvalues_out=values_out)


def equal_weights(updates: Sequence[ThinUpdate]) -> list[float]:
    """``1 / ||dW||`` per update, and 0 for a zero update, which costs nothing."""
    norms = [float(torch.linalg.vector_norm(update.S, dtype=torch.float64)) for update in updates]
    return [1 / norm if norm > 0 else 0.0 for norm in norms]


def input_rows(update: ThinUpdate, weight: float = 1.0) -> Float[Tensor, "r d_in"]:
    """Rows whose second moment is ``weight^2 dW^T dW``: what the input basis is fitted to."""
    return (weight * update.S)[:, None] * update.Vh


def output_rows(update: ThinUpdate, weight: float = 1.0) -> Float[Tensor, "r d_out"]:
    """Rows whose second moment is ``weight^2 dW dW^T``: what the output basis is fitted to."""
    return (update.U * (weight * update.S)).T


def project(update: ThinUpdate, basis: ProductBasis) -> Coefficients:
    """Coefficients of the balanced singular vectors; ``U @ coef_B @ coef_A @ V`` is the nearest update in the bases."""
    root = update.S.sqrt()
    return Coefficients(coef_A=root[:, None] * (update.Vh @ basis.V.T), coef_B=(basis.U.T @ update.U) * root)


def reconstruct(
    coefficients: Coefficients, basis: ProductBasis
) -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"]]:
    """Factors ``A' = coef_A @ V`` and ``B' = U @ coef_B`` of an ordinary LoRA with scale 1."""
    return coefficients.coef_A @ basis.V, basis.U @ coefficients.coef_B


def harmonic_size(k_in: int, k_out: int) -> float:
    """Rank above which one dense core is smaller than the pair: ``k_in k_out < r (k_in + k_out)``."""
    return k_in * k_out / (k_in + k_out)


def _leading(
    blocks: Sequence[Float[Tensor, "_ d"]], k: int, spare: Sequence[Float[Tensor, "_ d"]] = ()
) -> tuple[Float[Tensor, "k d"], Float[Tensor, " q"]]:
    moment = SecondMoment(blocks[0].shape[1], expect_rows=sum(len(block) for block in blocks))
    for block in blocks:
        moment.add(block)
    if spare and moment.rank_bound < k:
        # a narrow far side leaves free directions: they go to what the HOSVD would take, at a weight that changes
        # nothing else
        for block in spare:
            moment.add(1e-4 * block)
    return moment.basis(k)


def _kept_rows(seen: Float[Tensor, "k_far r"], rows: Float[Tensor, "r d"]) -> Float[Tensor, "p d"]:
    # the moment of (seen @ rows) from min(k_far, r) rows; the weight is already in them
    R: Tensor = torch.linalg.qr(seen).R
    return R @ rows
