"""How well a basis predicts an adapter it has never seen: the honest form of explained energy."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adapterbank.errors import BankError
from adapterbank.subspace.product import fit_product, project, reconstruct
from adapterbank.subspace.updates import ThinUpdate, difference_norm


@dataclass(frozen=True, kw_only=True)
class HeldOutReport:
    """Error of each update in a basis fitted without it, beside the error with it."""

    lost: tuple[float, ...]
    """``||dW - dW'||^2`` per adapter, held out."""
    lost_inside: tuple[float, ...]
    """The same in the basis of all adapters."""
    energy: tuple[float, ...]
    """``||dW||^2`` per adapter."""
    k_in: int
    """Input directions, at most what the remaining adapters allow."""
    k_out: int
    """Output directions."""

    @property
    def errors(self) -> tuple[float, ...]:
        """Relative error per adapter, held out; 1 means that the others know nothing about it."""
        return relative_errors(self.lost, self.energy)


def leave_one_out(updates: Sequence[ThinUpdate], k: int, *, folds: int = 16) -> HeldOutReport:
    """Leave-one-adapter-out projection error with ``k`` directions a side.

    Args:
        updates: Updates of one module, one per adapter, at least two.
        k: Directions a side; fewer where the remaining adapters have fewer rows.
        folds: More adapters than this are held out in so many groups, to keep the cost linear.

    Raises:
        BankError: If there are fewer than two updates.
    """
    n = len(updates)
    if n < 2:
        raise BankError("leaving one adapter out takes at least two")
    lost = [0.0] * n
    k_in, k_out = _bounds(updates, k)
    for fold in range(min(n, folds)):
        held = range(fold, n, folds)
        rest = [update for i, update in enumerate(updates) if i not in held]
        k_in, k_out = min(k_in, _bounds(rest, k)[0]), min(k_out, _bounds(rest, k)[1])
        for i, value in zip(held, _lost(rest, [updates[i] for i in held], k), strict=True):
            lost[i] = value
    energy = tuple(float(update.S.double().square().sum()) for update in updates)
    return HeldOutReport(
        lost=tuple(lost), lost_inside=tuple(_lost(updates, updates, k)), energy=energy, k_in=k_in, k_out=k_out
    )


def _bounds(updates: Sequence[ThinUpdate], k: int) -> tuple[int, int]:
    rows = sum(len(update.S) for update in updates)
    return min(k, rows, updates[0].Vh.shape[1]), min(k, rows, updates[0].U.shape[0])


def _lost(fitted: Sequence[ThinUpdate], measured: Sequence[ThinUpdate], k: int) -> list[float]:
    basis = fit_product(fitted, *_bounds(fitted, k))
    return [difference_norm(update, *reconstruct(project(update, basis), basis)) ** 2 for update in measured]


def relative_errors(lost: Sequence[float], energy: Sequence[float]) -> tuple[float, ...]:
    """``sqrt(lost / energy)`` each; 0 for a zero update, which costs nothing."""
    return tuple((part / whole) ** 0.5 if whole > 0 else 0.0 for part, whole in zip(lost, energy, strict=True))


def outliers(errors: Sequence[float], *, spread: float = 5.0, margin: float = 0.05) -> tuple[int, ...]:
    """Indices of adapters whose error lies far above the others': candidates to leave out of the bank.

    Args:
        errors: Relative errors, held out.
        spread: Standard deviations above the median, estimated from the median absolute deviation.
        margin: Least distance above the median, so that near-equal errors give no outlier.
    """
    if not errors:
        return ()
    values = torch.tensor(errors, dtype=torch.float64)
    median = values.median()
    # 1.4826: the deviation of a normal variable in units of its median absolute deviation
    reach = torch.maximum(1.4826 * spread * (values - median).abs().median(), torch.tensor(margin).double())
    return tuple(int(i) for i in (values > median + reach).nonzero().flatten())
