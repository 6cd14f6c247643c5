"""How many components to keep: by number, by a share of the spectrum, or by what the adapters then score."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from adapterbank.errors import BankError


def choose_k(
    singular_values: Float[Tensor, " q"],
    *,
    k: int | None = None,
    share: float | None = None,
    energy: float | None = None,
) -> int:
    """The number of components by exactly one rule, for one factor of one module.

    Args:
        singular_values: All of them, descending.
        k: A fixed number.
        share: Smallest ``k`` whose singular values sum to this share of all: EigenLoRA's rule (section 3.2).
        energy: Smallest ``k`` whose *squared* singular values do, the usual explained variance.

    Raises:
        BankError: If not exactly one rule is given, or it can't be met.
    """
    if sum(rule is not None for rule in (k, share, energy)) != 1:
        raise BankError("give exactly one of k, share and energy")
    bound = len(singular_values)
    if k is not None:
        if not 1 <= k <= bound:
            raise BankError(f"k={k} is outside [1, {bound}], the number of singular values")
        return k
    power, target = (1, share) if share is not None else (2, energy)
    if target is None or not 0 < target <= 1:
        raise BankError(f"a share of the spectrum lies in (0, 1], not {target}")
    return _smallest(explained(singular_values, power=power), target)


def explained(singular_values: Float[Tensor, " q"], *, power: int = 2) -> Float[Tensor, " q"]:
    """Cumulative share of ``s^power``; ``explained(s)[k - 1]`` is the energy in the first ``k`` components.

    Args:
        singular_values: Descending.
        power: 2 for energy, 1 for the paper's share. A zero spectrum counts as explained.
    """
    wide = singular_values.double().clamp_min(0) ** power
    total = float(wide.sum())
    return wide.cumsum(0) / total if total > 0 else torch.ones_like(wide)


def _smallest(shares: Float[Tensor, " q"], target: float) -> int:
    # 1e-12: the last partial sum may fall short of 1 by rounding
    reached = shares >= target - 1e-12
    return int(reached.int().argmax()) + 1


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Score for each number of components, and the pick."""

    scores: tuple[tuple[int, float], ...]
    """``(k, score)``, ascending in ``k``."""
    best: float
    """The best score."""
    k: int
    """The smallest ``k`` within the tolerance of the best."""


def sweep_k(score: Callable[[int], float], candidates: Sequence[int], *, tolerance: float = 0.0) -> Sweep:
    """The smallest ``k`` whose validation score is within ``tolerance`` of the best.

    Args:
        score: Scores the adapters rebuilt from ``k`` components; higher is better.
        candidates: Values of ``k`` to try.
        tolerance: Score one is ready to lose.

    Raises:
        BankError: If there is no candidate.
    """
    if not candidates:
        raise BankError("no k to try")
    scores = tuple((k, score(k)) for k in sorted(set(candidates)))
    best = max(value for _, value in scores)
    return Sweep(scores=scores, best=best, k=next(k for k, value in scores if value >= best - tolerance))
