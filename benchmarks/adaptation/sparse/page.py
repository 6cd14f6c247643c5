"""The sections of ``docs/benchmarks/shira.md`` on real tasks, from the committed results."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev

from benchmarks.adaptation.analysis import Cell, Part, paired
from benchmarks.adaptation.results import Line, load_results
from benchmarks.adaptation.sections import LORA
from benchmarks.adaptation.sections import TASKS as SHORT_NAMES
from benchmarks.adaptation.words import rates, signed
from benchmarks.markdown import table

EQUAL = "LoRA r=2"
REFERENCES = (LORA, "head")
"""From the main table of the adaptation study."""
MASKS = ("struct", "rand", "wm", "grad", "snip")
OF_PAPER = "snip, wm, grad, LoRA"
"""From the best down, on LLaMA-7B; struct was poor there (SHiRA, section 5)."""


def sections() -> list[str]:
    """All that there are results for."""
    part = compared()
    if not part.has(EQUAL, *MASKS):
        return []
    return [*_masks(part), *_fusion(list(load_results("sparse-fusion").values()), part), *_strength()]


def compared() -> Part:
    """Masks and LoRA at equal counts on the tasks and seeds that all have; of the study's main table the same."""
    ours = Part(_at_chosen_rates(list(load_results("sparse").values())))
    everywhere = set.intersection(*(set(cells) for cells in ours.cells.values())) if ours.cells else set()
    main = (line for line in load_results("main").values() if line["method"]["name"] in REFERENCES)
    return Part([line for line in (*ours.lines, *main) if (line["task"], line["seed"]) in everywhere])


def _at_chosen_rates(lines: Sequence[Line]) -> list[Line]:
    """Of each method the lines at the rate with the lowest mean validation loss where all its rates were tried."""
    by_rate: dict[str, dict[float, dict[Cell, Line]]] = {}
    for line in lines:
        rates_of = by_rate.setdefault(line["method"]["name"], {})
        rates_of.setdefault(line["method"]["lr"], {})[line["task"], line["seed"]] = line
    kept: list[Line] = []
    for found in by_rate.values():
        tried = set.intersection(*(set(cells) for cells in found.values()))
        best = min(found, key=lambda lr: sum(_final_loss(found[lr][cell]) for cell in tried))
        kept += found[best].values()
    return kept


def _final_loss(line: Line) -> float:
    return float(line["result"]["validation"][-1][1])


# --- masks ------------------------------------------------------------------------------------------------------------


def _masks(part: Part) -> list[str]:
    rows = []
    for name in sorted(part.cells, key=lambda name: part.mean(name, "test_loss")):
        final = {cell: points[-1][1] for cell, points in part.of(name, "validation").items()}
        rows.append(
            [
                f"**{name}**" if name in MASKS else name,
                f"{part.mean(name, 'trained'):,.0f}",
                _with_spread(part.of(name, "accuracy"), 3),
                "" if name == EQUAL else signed(part.difference(name, EQUAL)),
                _with_spread(part.of(name, "test_loss"), 3),
                "" if name == EQUAL else signed(part.difference(name, EQUAL, "test_loss")),
                _with_spread(final, 3),
                *(f"{part.mean(name, task=task):.3f}" for task in part.tasks),
                rates(*part.rates[name]),
            ]
        )
    header = [
        "", "trained", "accuracy", f"minus {EQUAL}", "test loss", f"minus {EQUAL}", "validation loss",
        *(SHORT_NAMES[task] for task in part.tasks), "rate, head's",
    ]  # fmt: skip
    seeds = ", ".join(map(str, sorted({seed for _, seed in part.cells[EQUAL]})))
    return [
        "## Masks on real tasks",
        f"MiniLM-L6, query and value of all 6 layers, density 1/96: 1,536 values a layer, as many as a LoRA of rank 2 "
        f"has; struct's whole rows and diagonal come to 1,533. Tasks {', '.join(part.tasks)}, seeds {seeds}; 320 "
        f"examples, {part.steps} steps of 16, AdamW without decay, the head trained beside, as in [the adaptation "
        "study](adaptation.md), whose rows LoRA r=8 and head are. Each method's rate has the lowest final validation "
        "loss on rotten-tomatoes and intent with the first seed, out of three a factor of 3 apart and further ones "
        "until the best was no edge; the head's rate beside all adapters is the study's. In the order of test loss, on "
        "400 texts a task (intent: 213). After the first ± stands the standard deviation over the seeds; with a "
        "difference, the standard error over cells, and in brackets over the tasks alone.",
        table(header, rows),
        _verdict(part),
    ]


def _with_spread(values: Mapping[Cell, float], digits: int) -> str:
    """Mean over cells, and the standard deviation of the seeds' means."""
    seeds = sorted({seed for _, seed in values})
    means = [mean(value for (_, s), value in values.items() if s == seed) for seed in seeds]
    spread = f" ± {stdev(means):.{digits}f}" if len(means) > 1 else ""
    return f"{mean(values.values()):.{digits}f}{spread}"


def _verdict(part: Part) -> str:
    gaps = {name: part.difference(name, EQUAL, "test_loss") for name in MASKS}
    lower = [name for name in MASKS if gaps[name].mean < -2 * gaps[name].error]
    higher = [name for name in MASKS if gaps[name].mean > 2 * gaps[name].error]
    near = [name for name in MASKS if name not in (*lower, *higher)]
    said = [
        f"lower by more than two standard errors for {_listed(lower)}" if lower else "",
        f"higher by more than two for {_listed(higher)}" if higher else "",
        f"within two standard errors for {_listed(near)}" if near else "",
    ]
    order = ", ".join(sorted((EQUAL, *MASKS), key=lambda name: part.mean(name, "test_loss")))
    return (
        f"Against {EQUAL}, which trains as many values, the test loss is {'; '.join(filter(None, said))}. From the "
        f"best down: {order}. In the paper, on commonsense questions with LLaMA-7B, it is {OF_PAPER}, and struct was "
        "poor on language. These are three tasks of one small model with a few seeds: an order within the standard "
        "errors is none."
    )


def _listed(names: Sequence[str]) -> str:
    return " and ".join((", ".join(names[:-1]), names[-1]) if len(names) > 1 else names)


# --- fusion -----------------------------------------------------------------------------------------------------------


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

    def pairs(self, field: str) -> float:
        """Mean over pairs of adapters and seeds."""
        return float(mean(pair[field] for line in self.lines for pair in line["result"]["pairs"]))


def fusions(lines: Sequence[Line]) -> dict[str, Fused]:
    """By name; only names with all the seeds that any has."""
    by_name: dict[str, list[Line]] = {}
    for line in lines:
        by_name.setdefault(line["name"], []).append(line)
    most = max(map(len, by_name.values()), default=0)
    return {name: Fused(found) for name, found in by_name.items() if len(found) == most}


def _fusion(lines: Sequence[Line], part: Part) -> list[str]:
    found = fusions(lines)
    if EQUAL not in found:
        return []
    base = found[EQUAL].drops
    rows = []
    for name in sorted(found, key=lambda name: mean(found[name].drops.values())):
        fused, drops = found[name], found[name].drops
        against = paired({cell: drops[cell] - base[cell] for cell in drops.keys() & base.keys()})
        rows.append(
            [
                name,
                f"{100 * mean(fused.cells('single').values()):.1f}",
                f"{100 * mean(fused.cells('fused').values()):.1f}",
                _with_spread(drops, 1),
                "" if name == EQUAL else f"{against.mean:+.1f} ± {against.error:.1f} ({against.error_over_tasks:.1f})",
                f"{mean(fused.cells('single', 'test_loss').values()):.3f}",
                f"{mean(fused.cells('fused', 'test_loss').values()):.3f}",
                f"{100 * fused.pairs('overlap'):.1f} %",
                f"{fused.pairs('awom'):.2f}",
                f"{fused.pairs('awor'):.2f}",
            ]
        )
    header = [
        "", "single", "fused", "%Drop", f"minus {EQUAL}'s", "test loss, single", "fused",
        "overlap", "AWOM", "AWOR",
    ]  # fmt: skip
    tasks, seeds = found[EQUAL].lines[0]["result"]["tasks"], len(found[EQUAL].lines)
    return [
        "## Three adapters in one model",
        f"The adapters of {', '.join(tasks)} added up on one frozen base, each task asked through its own head; "
        f"{seeds} seeds. *%Drop*: mean accuracy of each adapter alone minus that of all together, in points, as in the "
        "paper. *Own masks*: wm takes parts 0, 1, 2, struct offsets 0, 1, 2, rand a seed of its own for each task; "
        "*one mask*: all three change the same weights. grad and snip follow each task's gradient. Overlap, AWOM and "
        "AWOR (`interference`) are means over pairs; LoRA's are of its dense updates." + _floor(part),
        table(header, rows),
        _per_task(found),
        _fusion_verdict(found),
    ]


def _floor(part: Part) -> str:
    if not part.has("head"):
        return ""
    return f" A head alone on the base model has {100 * part.mean('head'):.1f} on these tasks and seeds."


def _per_task(found: Mapping[str, Fused]) -> str:
    tasks = list(next(iter(found.values())).lines[0]["result"]["tasks"])
    rows = [
        [name, *(f"{mean(drop for (t, _), drop in fused.drops.items() if t == task):.1f}" for task in tasks)]
        for name, fused in sorted(found.items(), key=lambda item: mean(item[1].drops.values()))
    ]
    return table(["%Drop", *(SHORT_NAMES[task] for task in tasks)], rows)


def _fusion_verdict(found: Mapping[str, Fused]) -> str:
    said = []
    for mask in ("wm", "struct", "rand"):
        own, one = (found.get(f"{mask}, {which}") for which in ("own masks", "one mask"))
        if own and one:
            gap = paired({cell: own.drops[cell] - one.drops[cell] for cell in own.drops.keys() & one.drops.keys()})
            said.append(f"{mask} {gap.mean:+.1f} ± {gap.error:.1f}")
    return (
        f"What masks of their own change in the drop, with the standard error over cells: {', '.join(said)}. In the "
        "paper, three tasks on LLaMA2-7B lose 11.1 points with LoRA, 4.4 with one WM mask and 3.6 with WM masks that "
        "share nothing."
    )


# --- strength ---------------------------------------------------------------------------------------------------------


def _strength() -> list[str]:
    lines = list(load_results("sparse-strength").values())
    if not lines:
        return []
    exact = sum(line["result"]["points"][0] == {"alpha": 0.0, **line["result"]["base"]} for line in lines)
    best = [min(line["result"]["points"], key=lambda point: point["test_loss"])["alpha"] for line in lines]
    full = sum(alpha == 1.0 for alpha in best)
    return [
        "## Strength",
        "`W + alpha * S` with one trained adapter, its head as trained, first seed: test loss above, accuracy below.",
        "![Loss and accuracy by strength](../pictures/sparse-strength.svg)",
        f"At alpha 0 loss and accuracy are the base model's in {exact} of {len(lines)} cases, to all digits kept. The "
        f"loss is lowest at the trained strength in {full} of them, below it in {sum(a < 1 for a in best)}, above in "
        f"{sum(a > 1 for a in best)}.",
    ]
