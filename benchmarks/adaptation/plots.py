"""The study's pictures: loss by step, accuracy by method, loss by basis."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.adaptation.analysis import Part
from benchmarks.adaptation.page import OURS, best_variant
from benchmarks.adaptation.sections import KINDS, LORA, TASKS, spectra
from benchmarks.pictures import BANK, GRID, INK, MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RIVALS = {
    "head": ("#94a3b8", (0, (1, 2))),
    LORA: (INK, "-"),
    "random": ("#0f766e", (0, (4, 2))),
    "paper": ("#7c3aed", (0, (4, 1, 1, 1))),
    "bank": ("#1d4ed8", "-"),
}
"""Colour and dashes; told apart by dashes too, for readers who don't see the hues."""

BASES = {
    "directions": "directions a side",
    "sources": "source adapters",
    "noise": "untrained adapters beside 13 trained",
}
"""Parts that vary the basis, with the names of what they vary."""


def draw(folder: Path) -> None:
    """Write every picture that there are results for."""
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "adapterbank"  # the same file from the same numbers
    main = Part.read("main")
    if main.lines:
        folder.mkdir(parents=True, exist_ok=True)
        _convergence(main, folder / "adaptation-convergence.svg")
        _accuracies(main, folder / "adaptation-accuracy.svg")
    if all(Part.read(name).lines for name in BASES):
        _bases(folder / "adaptation-basis.svg")
    if spectra():
        _spectra(folder / "adaptation-spectrum.svg")


def _convergence(main: Part, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.subplots(2, 3).flat
    shown = {**RIVALS, best_variant(main): (BANK, "-")}
    for axis, task in zip(axes, main.tasks, strict=False):
        frame(axis)
        for name, (color, dashes) in shown.items():
            points = main.curve(name, task) if name in main.cells else []
            axis.plot(
                [100 * share for share, _ in points], [loss for _, loss in points],
                color=color, linestyle=dashes, linewidth=2.2 if color == BANK else 1.3, label=name,
            )  # fmt: skip
        axis.set_title(TASKS[task], loc="left", color=INK, fontsize=10)
    figure.supxlabel("% of the steps", color=INK, fontsize=10)
    figure.supylabel("validation loss, mean of 3 seeds", color=INK, fontsize=10)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Date": None})


def _accuracies(main: Part, path: Path) -> None:
    from matplotlib.figure import Figure

    names = sorted(main.cells, key=main.mean)
    figure = Figure(figsize=(8.4, 4.4), layout="constrained")
    axis = figure.subplots()
    frame(axis)
    axis.axvline(main.mean(LORA), color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
    for place, name in enumerate(names):
        color = BANK if name in OURS else INK
        error = main.difference(name, LORA).error
        axis.errorbar([main.mean(name)], [place], xerr=error or None, fmt="o", color=color, markersize=6, capsize=2.5)
    axis.set_yticks(range(len(names)), [f"{name}   {main.mean(name, 'trained'):,.0f}" for name in names])
    for label, name in zip(axis.get_yticklabels(), names, strict=True):
        label.set_color(BANK if name in OURS else INK)
    axis.set_xlabel("mean accuracy; bars: standard error of the paired difference to LoRA r=8", color=INK, fontsize=9)
    axis.set_title("values trained beside the head", loc="left", x=-0.34, color=MUTED, fontsize=9)
    figure.savefig(path, metadata={"Date": None})


def _bases(path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = dict(zip(BASES, figure.subplots(1, 3, sharey=True), strict=True))  # what looks like a slope must be one
    for name, axis in axes.items():
        frame(axis)
        axis.set_xlabel(BASES[name], color=INK, fontsize=9)
        part = Part.read(name)
        for kind in KINDS if name == "directions" else KINDS[:1]:
            found = {_count(method): part.final_loss(method) for method in part.cells if method.startswith(kind)}
            color, dashes = RIVALS.get(kind, (BANK, "-"))
            axis.plot(*zip(*sorted(found.items()), strict=True), "o", color=color, linestyle=dashes, label=kind)
    axes["directions"].set_ylabel("validation loss", color=INK, fontsize=9)
    axes["directions"].legend(frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Date": None})


def _spectra(path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = dict(zip(("in", "out"), figure.subplots(1, 2, sharey=True), strict=True))
    for side, axis in axes.items():
        frame(axis)
        axis.set_title({"in": "input side", "out": "output side"}[side], loc="left", color=INK, fontsize=10)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("directions", color=INK, fontsize=9)
        for (name, found), color, dashes in zip(
            spectra().items(), (BANK, "#7c3aed", MUTED), ("-", (0, (4, 1, 1, 1)), (0, (1, 2))), strict=True
        ):
            axis.plot(found["directions"], found[side]["mean"], color=color, linestyle=dashes, label=name)
            axis.fill_between(
                found["directions"], found[side]["low"], found[side]["high"], color=color, alpha=0.12, linewidth=0
            )
        axis.set_xticks(found["directions"], map(str, found["directions"]))
    axes["in"].set_ylabel("share of energy; bands: over the layers", color=INK, fontsize=9)
    axes["in"].legend(frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Date": None})


def _count(method: str) -> int:
    """The number in a method's name: ``bank, k=16``, ``bank of 8``, ``bank with 4 untrained``."""
    return int(re.findall(r"\d+", method)[0])


def frame(axis: "Axes") -> None:
    """Quiet axes, the same in every picture."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(MUTED)
    axis.tick_params(colors=INK, labelsize=8.5, length=3)
    axis.grid(color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
