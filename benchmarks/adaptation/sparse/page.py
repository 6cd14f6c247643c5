"""The sections of ``docs/benchmarks/shira.md`` on real tasks, from the committed results."""

from collections.abc import Sequence
from statistics import mean

from benchmarks.adaptation.analysis import Cell, Part
from benchmarks.adaptation.results import Line, load_results
from benchmarks.adaptation.sections import LORA
from benchmarks.adaptation.sections import TASKS as SHORT_NAMES
from benchmarks.adaptation.sparse.fused import EQUAL, fusion
from benchmarks.adaptation.words import rates, signed, told_apart, with_spread
from benchmarks.markdown import table

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
    return [*_masks(part), *fusion(part), *_strength()]


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


def _masks(part: Part) -> list[str]:
    rows = []
    for name in sorted(part.cells, key=lambda name: part.mean(name, "test_loss")):
        final = {cell: points[-1][1] for cell, points in part.of(name, "validation").items()}
        rows.append(
            [
                f"**{name}**" if name in MASKS else name,
                f"{part.mean(name, 'trained'):,.0f}",
                with_spread(part.of(name, "accuracy"), 3),
                "" if name == EQUAL else signed(part.difference(name, EQUAL)),
                with_spread(part.of(name, "test_loss"), 3),
                "" if name == EQUAL else signed(part.difference(name, EQUAL, "test_loss")),
                with_spread(final, 3),
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


def _verdict(part: Part) -> str:
    gaps = {name: part.difference(name, EQUAL, "test_loss") for name in MASKS}
    order = ", ".join(sorted((EQUAL, *MASKS), key=lambda name: part.mean(name, "test_loss")))
    return (
        f"Against {EQUAL}, which trains as many values, the test loss is {told_apart(gaps)}. From the best down: "
        f"{order}. In the paper, on commonsense questions with LLaMA-7B, it is {OF_PAPER}, and struct was poor on "
        "language. These are three tasks of one small model with a few seeds: an order within the standard errors is "
        "none."
    )


def _strength() -> list[str]:
    lines = list(load_results("sparse-strength").values())
    if not lines:
        return []
    exact = sum(line["result"]["points"][0] == {"alpha": 0.0, **line["result"]["base"]} for line in lines)
    points = [{point["alpha"]: point for point in line["result"]["points"]} for line in lines]
    lowest = [min(at.values(), key=lambda point: point["test_loss"]) for at in points]
    gained = mean(100 * (at[1.0]["accuracy"] - at[0.0]["accuracy"]) for at in points)
    kept = mean(100 * (best["accuracy"] - at[0.0]["accuracy"]) for at, best in zip(points, lowest, strict=True))
    alphas = [best["alpha"] for best in lowest]
    return [
        "## Strength",
        "`W + alpha * S` with one trained adapter, its head as trained, first seed.",
        "![Loss and accuracy by strength](../pictures/sparse-strength.svg)",
        f"At alpha 0 loss and accuracy are the base model's in {exact} of {len(lines)} cases, to all digits kept. The "
        f"test loss is lowest at alphas from {min(alphas):g} to {max(alphas):g}. In the mean, accuracy gains "
        f"{gained:.1f} points from alpha 0 to 1, and {kept:.1f} up to the lowest loss.",
    ]
