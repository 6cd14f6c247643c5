"""How the study's figures are written."""

from collections.abc import Sequence
from statistics import median

from benchmarks.adaptation.analysis import Paired


def signed(difference: Paired) -> str:
    """``-.004 ± .003 (.005)``."""
    return f"{difference.mean:+.3f} ± {difference.error:.3f} ({difference.error_over_tasks:.3f})"


def percent(share: float | None) -> str:
    """A share of the steps, or that it was never reached."""
    return "never" if share is None else f"{100 * share:.0f} %"


def told(shares: Sequence[float | None]) -> str:
    """The median, counting what was never reached as more than all."""
    value = median(2.0 if share is None else share for share in shares)
    missed = sum(share is None for share in shares)
    return percent(None if value >= 1.5 else value) + (f" ({missed} never)" if missed else "")


def kilobytes(count: float) -> str:
    """``12 kB``."""
    return f"{count / 1e3:.0f} kB"


def rates(lr: float, head_lr: float) -> str:
    """``0.01, 0.003``."""
    return f"{lr:.2g}, {head_lr:.2g}"
