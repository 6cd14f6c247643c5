"""How the study's figures are written."""

from collections.abc import Mapping, Sequence
from statistics import mean, median_high, stdev

from benchmarks.adaptation.analysis import Cell, Paired


def signed(difference: Paired) -> str:
    """``-.004 ± .003 (.005)``."""
    return f"{difference.mean:+.3f} ± {difference.error:.3f} ({difference.error_over_tasks:.3f})"


def percent(share: float | None) -> str:
    """A share of the steps, or that it was never reached."""
    return "never" if share is None else f"{100 * share:.0f} %"


def told(shares: Sequence[float | None]) -> str:
    """After which share more than half of them had got there, and how many never did."""
    value = median_high(float("inf") if share is None else share for share in shares)
    missed = sum(share is None for share in shares)
    return percent(None if value == float("inf") else value) + (f" ({missed} never)" if missed else "")


def counted(count: int, noun: str) -> str:
    """``1 seed``, ``3 seeds``."""
    return f"{count} {noun}" + ("s" if count != 1 else "")


def kilobytes(count: float) -> str:
    """``12 kB``, ``3.4 kB``."""
    return f"{count / 1e3:.{1 if 0 < count < 9950 else 0}f} kB"


def rates(lr: float, head_lr: float) -> str:
    """``0.01, 0.003``."""
    return f"{lr:.2g}, {head_lr:.2g}"


def with_spread(values: Mapping[Cell, float], digits: int) -> str:
    """Mean over cells, and the standard deviation of the seeds' means."""
    seeds = sorted({seed for _, seed in values})
    means = [mean(value for (_, s), value in values.items() if s == seed) for seed in seeds]
    spread = f" ± {stdev(means):.{digits}f}" if len(means) > 1 else ""
    return f"{mean(values.values()):.{digits}f}{spread}"


def told_apart(gaps: Mapping[str, Paired]) -> str:
    """Which differences are larger than two standard errors."""
    lower = [name for name, gap in gaps.items() if gap.mean < -2 * gap.error]
    higher = [name for name, gap in gaps.items() if gap.mean > 2 * gap.error]
    near = [name for name in gaps if name not in (*lower, *higher)]
    said = [
        f"lower by more than two standard errors for {listed(lower)}" if lower else "",
        f"higher by more than two standard errors for {listed(higher)}" if higher else "",
        f"within two standard errors for {listed(near)}" if near else "",
    ]
    return "; ".join(filter(None, said))


def listed(names: Sequence[str]) -> str:
    """``*a*, *b* and *c*``."""
    marked = [f"*{name}*" for name in names]
    return " and ".join((", ".join(marked[:-1]), marked[-1]) if len(marked) > 1 else marked)
