"""The section on several adapters in one model: what each task loses."""

from collections.abc import Mapping, Sequence
from statistics import mean

from benchmarks.adaptation.analysis import Cell, Paired, Part, paired
from benchmarks.adaptation.results import Line, load_results
from benchmarks.adaptation.sections import TASKS as SHORT_NAMES
from benchmarks.adaptation.words import told_apart, with_spread
from benchmarks.markdown import table

EQUAL = "LoRA r=2"
"""At the masks' count."""
OWN = {
    "wm": "wm takes parts 0, 1, 2",
    "struct": "struct begins at rows 0, 1, 2",
    "rand": "rand has a seed for each task",
}
"""How adapters that are fused get positions of their own."""


class Fused:
    """The fusions of one name over the seeds."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self.lines = lines

    def cells(self, state: str, field: str = "accuracy") -> dict[Cell, float]:
        """``single`` or ``fused``, by task and seed."""
        return {
            (task, line["seed"]): found[state][field]
            for line in self.lines
            for task, found in line["result"]["tasks"].items()
        }

    @property
    def drops(self) -> dict[Cell, float]:
        """Points of accuracy that are lost, in percent."""
        single, fused = self.cells("single"), self.cells("fused")
        return {cell: 100 * (single[cell] - fused[cell]) for cell in single}

    @property
    def drop(self) -> float:
        """Mean over tasks and seeds."""
        return mean(self.drops.values())

    def pairs(self, field: str) -> float:
        """Mean over pairs of adapters and seeds."""
        return float(mean(pair[field] for line in self.lines for pair in line["result"]["pairs"]))


def fusions(lines: Sequence[Line]) -> dict[str, Fused]:
    """By name, from the smallest drop; only names with all the seeds that any has."""
    by_name: dict[str, list[Line]] = {}
    for line in lines:
        by_name.setdefault(line["name"], []).append(line)
    most = max(map(len, by_name.values()), default=0)
    found = {name: Fused(lines) for name, lines in by_name.items() if len(lines) == most}
    return dict(sorted(found.items(), key=lambda item: item[1].drop))


def fusion(part: Part) -> list[str]:
    """The section, beside ``part``: what the same tasks' table has."""
    found = fusions(list(load_results("sparse-fusion").values()))
    if EQUAL not in found:
        return []
    gaps = {name: _between(fused, found[EQUAL]) for name, fused in found.items() if name != EQUAL}
    rows = [
        [
            name,
            f"{100 * mean(fused.cells('single').values()):.1f}",
            f"{100 * mean(fused.cells('fused').values()):.1f}",
            with_spread(fused.drops, 1),
            _points(gaps[name]) if name in gaps else "",
            f"{mean(fused.cells('single', 'test_loss').values()):.3f}",
            f"{mean(fused.cells('fused', 'test_loss').values()):.3f}",
            f"{100 * fused.pairs('overlap'):.1f} %",
            f"{fused.pairs('awom'):.2f}",
            f"{fused.pairs('awor'):.2f}",
            f"{fused.pairs('distance'):.1f}",
        ]
        for name, fused in found.items()
    ]
    header = [
        "", "single", "fused", "%Drop", f"minus {EQUAL}'s", "test loss, single", "fused",
        "overlap", "AWOM", "AWOR", "distance",
    ]  # fmt: skip
    own = [told for mask, told in OWN.items() if f"{mask}, own masks" in found] or ["none yet"]
    tasks, seeds = found[EQUAL].lines[0]["result"]["tasks"], len(found[EQUAL].lines)
    return [
        "## Three adapters in one model",
        f"The adapters of {', '.join(tasks)} added up on one frozen base, each task asked through its own head; "
        f"{seeds} seeds. *%Drop*: mean accuracy of each adapter alone minus that of all together, in points, as in the "
        f"paper. *One mask*: all three change the same weights; *own masks*: {', '.join(own)}. grad and snip follow "
        "each task's gradient. Overlap, AWOM, AWOR and distance (`interference`) are means over pairs; LoRA's are of "
        "its dense updates." + _floor(part),
        table(header, rows),
        _per_task(found),
        _verdict(found, gaps),
    ]


def _floor(part: Part) -> str:
    if not part.has("head"):
        return ""
    return f" A head alone on the base model has {100 * part.mean('head'):.1f} on these tasks and seeds."


def _per_task(found: Mapping[str, Fused]) -> str:
    tasks = list(next(iter(found.values())).lines[0]["result"]["tasks"])
    rows = [
        [name, *(f"{mean(drop for (t, _), drop in fused.drops.items() if t == task):.1f}" for task in tasks)]
        for name, fused in found.items()
    ]
    return table(["%Drop", *(SHORT_NAMES[task] for task in tasks)], rows)


def _between(one: Fused, other: Fused) -> Paired:
    """How much more is lost, over the tasks and seeds of both."""
    return paired({cell: one.drops[cell] - other.drops[cell] for cell in one.drops.keys() & other.drops.keys()})


def _points(gap: Paired) -> str:
    return f"{gap.mean:+.1f} ± {gap.error:.1f} ({gap.error_over_tasks:.1f})"


def _verdict(found: Mapping[str, Fused], gaps: Mapping[str, Paired]) -> str:
    pairs = {mask: (f"{mask}, own masks", f"{mask}, one mask") for mask in OWN}
    own = {mask: _between(found[a], found[b]) for mask, (a, b) in pairs.items() if a in found and b in found}
    told = (f"{mask} {_points(gap)}" for mask, gap in own.items())
    best = next(iter(found))
    least_awom = min(found, key=lambda name: found[name].pairs("awom"))
    most_awor = max(found, key=lambda name: found[name].pairs("awor"))
    return (
        f"Against {EQUAL}'s, the drop is {told_apart(gaps)}."
        + (f" A mask of its own for each task changes it by: {', '.join(told)}." if own else "")
        + " In the paper, three tasks on LLaMA2-7B lose 11.1 points with LoRA, 4.4 with one WM mask and 3.6 with WM "
        f"masks that share nothing. The lowest AWOM is that of *{least_awom}*, with a drop of "
        f"{found[least_awom].drop:.1f}, the highest AWOR that of *{most_awor}*, with {found[most_awor].drop:.1f}; the "
        f"smallest drop, {found[best].drop:.1f}, is that of *{best}*."
    )
