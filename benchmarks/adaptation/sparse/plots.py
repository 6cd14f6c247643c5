"""Loss and accuracy by an adapter's strength, as a picture."""

from pathlib import Path

from benchmarks.adaptation.plots import frame
from benchmarks.adaptation.results import Line, load_results
from benchmarks.pictures import BANK, INK, MUTED

STYLES = {
    "LoRA r=2": (INK, "-"),
    "struct": ("#0f766e", (0, (4, 2))),
    "rand": ("#94a3b8", (0, (1, 2))),
    "wm": ("#7c3aed", (0, (4, 1, 1, 1))),
    "grad": ("#1d4ed8", "-"),
    "snip": (BANK, "-"),
}
"""Colour and dashes."""
SHOWN = {"test_loss": "test loss", "accuracy": "accuracy"}


def draw(folder: Path) -> None:
    """Write the picture, if there are results for it."""
    lines = list(load_results("sparse-strength").values())
    if lines:
        folder.mkdir(parents=True, exist_ok=True)
        draw_strength(lines, folder / "sparse-strength.svg")


def draw_strength(lines: list[Line], path: Path) -> None:
    """A row a task, a line a method."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "adapterbank"  # the same file from the same numbers
    tasks = list(dict.fromkeys(line["adapter"]["task"] for line in lines))
    figure = Figure(figsize=(8.4, 0.6 + 2.4 * len(tasks)), layout="constrained")
    grid = figure.subplots(len(tasks), len(SHOWN), squeeze=False, sharex=True)
    for task, row in zip(tasks, grid, strict=True):
        for (field, label), axis in zip(SHOWN.items(), row, strict=True):
            frame(axis)
            axis.axvline(1.0, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
            axis.set_title(f"{task}, {label}", loc="left", color=INK, fontsize=10)
            for line in (line for line in lines if line["adapter"]["task"] == task):
                name, points = line["adapter"]["method"]["name"], line["result"]["points"]
                color, dashes = STYLES[name]
                axis.plot(
                    [point["alpha"] for point in points], [point[field] for point in points],
                    color=color, linestyle=dashes, linewidth=1.6, label=name,
                )  # fmt: skip
    figure.supxlabel("alpha", color=INK, fontsize=10)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Date": None}) if path.suffix == ".svg" else figure.savefig(path, dpi=150)
