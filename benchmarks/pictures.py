"""The README's picture: error against bytes on real adapters, drawn from the committed result."""

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
