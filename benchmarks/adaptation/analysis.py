"""From lines to figures: means with their spread, paired differences, steps to a loss."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev
from typing import Any

from benchmarks.adaptation.results import Line, load_results

Cell = tuple[str, int]
"""A task and a seed."""


class Part:
    """The results of one part, by method and cell."""

    def __init__(self, lines: Sequence[Line]) -> None:
        """Where two lines are of the same cell of a method, the first one counts."""
        self.lines = lines
        self.cells: dict[str, dict[Cell, dict[str, Any]]] = {}
        for line in lines:
            cells = self.cells.setdefault(line["method"]["name"], {})
            cells.setdefault((line["task"], line["seed"]), line["result"])
        self.rates = {name: (lr, head_lr) for name, lr, head_lr in map(_rates_of, lines)}
        """Of each method and of its head; in parts where they vary, the last."""

    @classmethod
    def read(cls, *names: str) -> "Part":
        """The files of these parts together."""
        return cls([line for name in names for line in load_results(name).values()])

    def at_best_rates(self) -> "Part":
        """Of each method only the runs at the rates with the lowest mean final validation loss."""
        losses: dict[tuple[str, float, float], list[float]] = {}
        for line in self.lines:
            losses.setdefault(_rates_of(line), []).append(line["result"]["validation"][-1][1])
        most = max(map(len, losses.values()), default=0)  # rates that weren't tried on all tasks are no candidates
        ranked = sorted((mean(found), key) for key, found in losses.items() if len(found) == most)
        best: dict[str, tuple[str, float, float]] = {}
        for _, key in ranked:
            best.setdefault(key[0], key)
        return Part([line for line in self.lines if _rates_of(line) == best.get(line["method"]["name"])])

    def on(self, tasks: Iterable[str]) -> "Part":
        """The lines of some tasks."""
        wanted = set(tasks)
        return Part([line for line in self.lines if line["task"] in wanted])

    def of_family(self, family: str) -> "Part":
        """The lines of one family of source adapters, and those that take none."""
        return Part([line for line in self.lines if (line["sources"] or {"family": family})["family"] == family])

    def as_seen_by(self, other: "Part") -> "Part":
        """The lines of the tasks and seeds that the other has."""
        cells = {(line["task"], line["seed"]) for line in other.lines}
        return Part([line for line in self.lines if (line["task"], line["seed"]) in cells])

    def has(self, *methods: str) -> bool:
        """Whether there are results of all these methods."""
        return all(method in self.cells for method in methods)

    @property
    def steps(self) -> int:
        """Of every run, which have equally many."""
        (found,) = {int(line["steps"]) for line in self.lines}
        return found

    @property
    def seeds(self) -> int:
        """How many there are."""
        return len({line["seed"] for line in self.lines})

    @property
    def tasks(self) -> list[str]:
        """In the order in which they were run."""
        return list(dict.fromkeys(line["task"] for line in self.lines))

    def of(self, method: str, field: str) -> dict[Cell, Any]:
        """One field of a method's results."""
        return {cell: result[field] for cell, result in self.cells.get(method, {}).items() if field in result}

    def final_losses(self, method: str) -> dict[Cell, float]:
        """Final validation loss of each cell."""
        return {cell: points[-1][1] for cell, points in self.of(method, "validation").items()}

    def final_loss(self, method: str) -> float:
        """Mean final validation loss."""
        return mean(self.final_losses(method).values())

    def mean(self, method: str, field: str = "accuracy", task: str | None = None) -> float:
        """Mean over cells, of one task if named."""
        return mean(value for cell, value in self.of(method, field).items() if task in (None, cell[0]))

    def spread(self, method: str, field: str = "accuracy") -> float | None:
        """Standard deviation over the seeds of the mean over the tasks; none with one seed."""
        values = self.of(method, field)
        seeds = sorted({seed for _, seed in values})
        means = [mean(value for (_, s), value in values.items() if s == seed) for seed in seeds]
        return stdev(means) if len(means) > 1 else None

    def difference(self, method: str, other: str, field: str = "accuracy") -> "Paired":
        """Method minus other over the cells that both have."""
        return gap(self.of(method, field), self.of(other, field))

    def loss_difference(self, method: str, other: str) -> "Paired":
        """As :meth:`difference`, of the final validation losses."""
        return gap(self.final_losses(method), self.final_losses(other))

    def curve(self, method: str, task: str) -> list[tuple[float, float]]:
        """Share of the steps and validation loss, the mean over the seeds."""
        found: dict[float, list[float]] = {}
        for (name, _), points in self.of(method, "validation").items():
            if name == task:
                for step, loss, _accuracy in points:
                    found.setdefault(step / points[-1][0], []).append(loss)
        return [(share, mean(losses)) for share, losses in sorted(found.items())]

    def mean_curve(self, method: str) -> list[tuple[float, float]]:
        """As :meth:`curve`, the mean over the tasks: they have equally many steps."""
        curves = [self.curve(method, task) for task in self.tasks]
        return [(points[0][0], mean(loss for _, loss in points)) for points in zip(*filter(None, curves), strict=True)]


def _rates_of(line: Line) -> tuple[str, float, float]:
    return line["method"]["name"], line["method"]["lr"], line["method"]["head_lr"]


@dataclass(frozen=True)
class Paired:
    """A mean difference over cells."""

    mean: float
    error: float
    """Standard error over cells: tasks and seeds together."""
    error_over_tasks: float
    """Standard error over the tasks' means: what says most about a next task."""
    cells: int


def gap(ours: Mapping[Cell, float], theirs: Mapping[Cell, float]) -> Paired:
    """Ours minus theirs over the cells that both have."""
    # in the order of ours: sums of floats depend on it, and that of a set varies
    return paired({cell: value - theirs[cell] for cell, value in ours.items() if cell in theirs})


def paired(differences: Mapping[Cell, float]) -> Paired:
    """Mean and standard errors of differences."""
    by_task: dict[str, list[float]] = {}
    for (task, _), value in differences.items():
        by_task.setdefault(task, []).append(value)
    return Paired(
        mean=mean(differences.values()),
        error=standard_error(differences.values()),
        error_over_tasks=standard_error(mean(values) for values in by_task.values()),
        cells=len(differences),
    )


def standard_error(values: Iterable[float]) -> float:
    """Of the mean; 0 for a single value."""
    found = list(values)
    return stdev(found) / sqrt(len(found)) if len(found) > 1 else 0.0


def reached(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """Share of the steps after which a loss is first at most ``target``, between two points by a straight line."""
    before: tuple[float, float] | None = None
    for share, loss in curve:
        if loss <= target:
            if before is None or before[1] <= target:
                return share
            return before[0] + (share - before[0]) * (before[1] - target) / (before[1] - loss)
        before = (share, loss)
    return None
