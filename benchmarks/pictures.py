"""Pictures drawn from the committed results: error against bytes, time of a switch, time of a request."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
INK, MUTED, GRID, BANK = "#1f2430", "#6b7280", "#eceef2", "#c2410c"
STYLES = {
    "SVD, 16 bits": ("#0f766e", "o"),
    "SVD + int4": ("#1d4ed8", "s"),
    "int8": ("#7c3aed", "D"),
    "int4": ("#7c3aed", "D"),
    "lorashare": ("#64748b", "^"),
    "vlora": ("#94a3b8", "v"),
}
"""Colour and marker; told apart by shape too, for readers who don't see the hues."""
SWITCHES: dict[str, dict[str, Any]] = {
    "PEFT LoRA": {"color": INK, "marker": "o", "markersize": 4, "linewidth": 1.1},
    "LoRA by addmm_": {"color": "#64748b", "marker": "v", "markersize": 4, "linewidth": 1.1},
    "PEFT SHiRA": {"color": "#7c3aed", "marker": "D", "markersize": 4, "linewidth": 1.1},
    "Super-Tuning": {"color": "#1d4ed8", "marker": "s", "markersize": 4, "linewidth": 1.1},
    "copies of all weights": {"color": "#0f766e", "marker": "^", "markersize": 4, "linewidth": 1.1},
    "bit-exact": {"color": BANK, "marker": "o", "markersize": 5.5, "linewidth": 2.6, "zorder": 5},
}
"""The lines of the switches' picture."""
WORKING_SETS: dict[str, dict[str, Any]] = {
    "in memory": {"color": BANK, "marker": "o", "markersize": 5.5, "linewidth": 2.6, "zorder": 5},
    "memory for a tenth": {"color": BANK, "marker": "s", "markersize": 4, "linewidth": 1.1},
    "the same, with a cache": {"color": "#0f766e", "marker": "^", "markersize": 4, "linewidth": 1.1},
    "PEFT, hot swapping": {"color": INK, "marker": "o", "markersize": 4, "linewidth": 1.1},
}
"""The lines of the working sets' picture."""
ORTHOGONALITY: dict[str, dict[str, Any]] = {
    "struct, own rows": {"color": BANK, "marker": "o", "markersize": 5.5, "linewidth": 2.6, "zorder": 5},
    "wm, one mask": {"color": "#1d4ed8", "marker": "s", "markersize": 5.5, "linewidth": 1.1},
    "wm, own masks": {"color": "#7c3aed", "marker": "D", "markersize": 3, "linewidth": 1.1},
    "struct, one mask": {"color": "#64748b", "marker": "v", "markersize": 4, "linewidth": 1.1},
    "sparse LoRA": {"color": "#0f766e", "marker": "^", "markersize": 5.5, "linewidth": 1.1},
    "LoRA": {"color": INK, "marker": "o", "markersize": 3, "linewidth": 1.1},
}
"""The lines of the picture of masks in each other's way."""
LEFT, RIGHT, LOW, HIGH = 2.8, 150.0, 0.0015, 1.25


def draw_rate_distortion(result: dict[str, Any], path: Path) -> Path:
    """One line a method, both axes logarithmic, every line named where it ends."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "adapterbank"  # the same file from the same numbers
    figure = Figure(figsize=(8.4, 4.9), layout="constrained")
    axis = figure.subplots()
    _frame(axis, result)
    for name, (color, marker) in STYLES.items():
        points = sorted((p["ratio"], p["error"]) for p in result["rivals"][name] if LEFT <= p["ratio"] <= RIGHT)
        if points:
            _line(axis, points, color=color, marker=marker, markersize=4, linewidth=1.1)
            _label(axis, name, points, color)
    bank = [(row["ratio"], row["error"]) for row in result["rows"]]
    bound = [(row["ratio"], row["bound"]) for row in result["rows"]]
    _line(axis, bound, color=INK, linewidth=1, linestyle=(0, (1, 2)))
    _line(axis, bank, color=BANK, marker="o", markersize=5.5, linewidth=2.6, zorder=5)
    x, y = next(point for point in bank if point[0] > 5.5)
    axis.annotate("bank", (x, y), (24, -16), textcoords="offset points", color=BANK, fontsize=13, weight="bold")
    x, y = next(point for point in bound if point[0] > 4.5)
    axis.annotate("bound without sharing", (x, y), (10, -12), textcoords="offset points", color=INK, fontsize=8.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None}) if path.suffix == ".svg" else figure.savefig(path, dpi=150)
    return path


def draw_switching(rows: tuple[list[dict[str, Any]], list[dict[str, Any]]], path: Path) -> Path:
    """Time of a switch over the weights of all layers, by density and by width; both axes logarithmic.

    Args:
        rows: Results by density, and by width.
        path: SVG to write.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    matplotlib.rcParams["svg.hashsalt"] = "adapterbank"  # the same file from the same numbers
    figure = Figure(figsize=(8.4, 4.2), layout="constrained")
    titles = [f"layers {rows[0][0]['width']} wide", f"density {100 * rows[1][0]['density']:g} %"]
    axes = figure.subplots(1, 2, sharey=True)
    for axis, of, key, title in zip(axes, rows, ("density", "width"), titles, strict=True):
        _plain(axis)
        axis.set(xscale="log", yscale="log")
        axis.set_title(title, loc="left", color=INK, fontsize=10)
        ticks = [f"{100 * row[key]:g} %" if key == "density" else f"{row[key]}" for row in of]
        axis.set_xticks([row[key] for row in of], ticks)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.set_xlabel("density of the adapters" if key == "density" else "width of the layers", color=INK)
        for name, style in SWITCHES.items():
            _line(axis, [(row[key], _ns_per_weight(row, name)) for row in of], label=name, **style)
        floor = [(row[key], 2 * _ns_per_weight(row, "the values alone, once")) for row in of]
        _line(axis, floor, label="floor: two overwrites", color=INK, linewidth=1, linestyle=(0, (1, 2)))
    axes[0].set_ylabel("CPU ns for each weight of the layers", color=INK)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    return path


def draw_working_set(rows: list[dict[str, Any]], path: Path) -> Path:
    """CPU time of a request by the number of members that requests are for."""
    lines = {name: [(row["members"], 1e3 * row["seconds"][name]) for row in rows] for name in WORKING_SETS}
    labels = {"xlabel": "members asked for, in random order", "ylabel": "CPU ms a request"}
    return _draw_lines(lines, WORKING_SETS, path, legend=2, ylim=(0, None), **labels)


def draw_orthogonality(rows: list[dict[str, Any]], path: Path) -> Path:
    """AWOR by size of the layer."""
    lines = {kind: [(row["size"], row["awor"]) for row in rows if row["kind"] == kind] for kind in ORTHOGONALITY}
    labels = {"xlabel": "width of the layer", "ylabel": "AWOR: zeros in $S_1^T S_2$"}
    return _draw_lines(lines, ORTHOGONALITY, path, legend=3, ylim=(-0.03, 1.03), **labels)


def _draw_lines(
    lines: dict[str, list[tuple[float, float]]],
    styles: dict[str, dict[str, Any]],
    path: Path,
    *,
    legend: int,
    **axes: Any,
) -> Path:
    """Lines by a number on a logarithmic axis, every one of its values marked.

    Args:
        lines: Points by name.
        styles: By name.
        path: SVG to write.
        legend: Columns of the legend.
        axes: What the axes say and where they end.
    """
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "adapterbank"  # the same file from the same numbers
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axis = figure.subplots()
    _plain(axis)
    axis.set(xscale="log")
    for name, points in lines.items():
        _line(axis, points, label=name, **styles[name])
    values = sorted({x for points in lines.values() for x, _ in points})
    axis.set_xticks(values, [f"{x:,}" for x in values])
    axis.minorticks_off()
    axis.set(**axes)
    figure.legend(loc="outside upper center", ncols=legend, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    return path


def _ns_per_weight(row: dict[str, Any], name: str) -> float:
    (way,) = (way for way in row["ways"] if way["way"] == name)
    return 1e9 * float(way["cpu_seconds"]) / (row["layers"] * row["width"] ** 2)


def _frame(axis: "Axes", result: dict[str, Any]) -> None:
    axis.set(xscale="log", yscale="log", xlim=(LEFT, RIGHT), ylim=(LOW, HIGH))
    ticks = [3, 4, 7.5, 15, 30, 60, 120]
    axis.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    errors = [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1]
    axis.set_yticks(errors, [f"{error:g}" for error in errors])
    axis.minorticks_off()
    axis.set_xlabel("times smaller than in 32 bits, everything counted", color=INK)
    axis.set_ylabel("error of the update, relative", color=INK)
    title = f"{result['adapters']} real LoRA adapters: error at equal bytes (lower is better)"
    axis.set_title(title, loc="left", color=INK, fontsize=12, pad=12)
    _plain(axis)


def _plain(axis: "Axes") -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(MUTED)
    axis.tick_params(colors=INK, labelsize=9, length=3)
    axis.grid(color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)


def _line(axis: "Axes", points: list[tuple[float, float]], **style: Any) -> None:
    axis.plot([x for x, _ in points], [y for _, y in points], **style)


def _label(axis: "Axes", name: str, points: list[tuple[float, float]], color: str) -> None:
    places = {"int8": (-6, -3), "int4": (7, -3), "SVD + int4": (0, 8)}
    offset = places.get(name, (7, -3))
    side = "right" if offset[0] < 0 else "left"
    axis.annotate(name, points[-1], offset, textcoords="offset points", color=color, fontsize=9, ha=side)
