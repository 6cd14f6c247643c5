"""The demo's two pictures, drawn without a display."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from adapterbank.adapters import LoraAdapter
from adapterbank.demo.curves import Point
from adapterbank.subspace.diagnosis import SpectrumReport, spectrum_against_null
from adapterbank.subspace.updates import thin_svd

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2430", "#8a8f9c", "#e6e8ee"
BANK = "#c2410c"
# told apart by lightness too, for readers who don't see the hues
RIVALS = ("#1d4ed8", "#60a5fa", "#0f766e", "#7c3aed", "#a78bfa")


def draw_spectrum(adapters: Sequence[LoraAdapter], path: Path, *, seed: int = 0) -> Path:
    """Energy that ``k`` shared directions explain, mean over modules, beside random directions of the same strength."""
    reports = [_spectrum(adapters, module, seed) for module in sorted({m for a in adapters for m in a.modules})]
    figure, axes = _figure(2, "Does one basis serve all adapters? Only what lies above the dashed line is shared")
    for axis, side, where in zip(axes, ("in", "out"), ("input side (A)", "output side (B)"), strict=True):
        real, null = (_mean([getattr(r, f"{kind}_{side}") for r in reports]) for kind in ("real", "null"))
        k = range(1, len(real) + 1)
        axis.plot(k, real.tolist(), color=BANK, linewidth=2, label="these adapters")
        axis.plot(k, null.tolist(), color=INK, linewidth=1.5, linestyle="--", label="random, same strengths")
        axis.set(title=where, xlabel="directions k", ylim=(0, 1.02), xlim=(1, len(k)))
    axes[0].set_ylabel("share of energy explained")
    axes[1].legend(frameon=False, loc="lower right")
    return _save(figure, path)


def draw_rate_distortion(bank: Sequence[Point], rivals: Mapping[str, Sequence[Point]], path: Path) -> Path:
    """Error of the update against the ratio of bytes, both logarithmic; down and to the right is better."""
    figure, (axis,) = _figure(1, "Error of the restored updates at equal bytes: lower is better")
    for color, (name, points) in zip(RIVALS, rivals.items(), strict=False):
        _draw(axis, points, label=name, color=color, linewidth=1.2, marker="o", markersize=4)
    _draw(axis, bank, label="bank", color=BANK, linewidth=2.4, marker="o", markersize=6, zorder=5)
    axis.set(xscale="log", yscale="log", xlabel="ratio: fp32 bytes of all A and B / bytes needed")
    axis.set_ylabel("error of the update, relative, root mean square")
    axis.set_xticks(ticks := [2, 4, 8, 16, 32, 64], [f"{tick}x" for tick in ticks], minor=False)
    axis.minorticks_off()
    axis.yaxis.set_major_formatter("{x:g}")
    axis.legend(frameon=False, loc="lower right")
    return _save(figure, path)


def _spectrum(adapters: Sequence[LoraAdapter], module: str, seed: int) -> SpectrumReport:
    factors = [adapter.factors(module) for adapter in adapters if module in adapter.modules]
    return spectrum_against_null([thin_svd(f.A, f.B, f.scale) for f in factors], seed=seed)


def _mean(curves: Sequence[Float[Tensor, " _"]]) -> Float[Tensor, " q"]:
    # a narrow module has fewer directions than a wide one, and they explain everything
    longest = max(len(curve) for curve in curves)
    return torch.stack([F.pad(curve, (0, longest - len(curve)), value=1.0) for curve in curves]).mean(0)


def _draw(axis: "Axes", points: Sequence[Point], **style: Any) -> None:
    ordered = sorted(points, key=lambda point: point.ratio)
    line = "-" if len(ordered) > 1 else ""
    axis.plot([point.ratio for point in ordered], [point.error for point in ordered], linestyle=line, **style)


def _figure(panels: int, title: str) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * panels if panels > 1 else 7.2, 4.2), layout="constrained")
    figure.suptitle(title, color=INK, fontsize=11, x=0.01, ha="left")
    axes = list(figure.subplots(1, panels, squeeze=False, sharey=True)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(MUTED)
        axis.tick_params(colors=INK, labelsize=9)
        axis.grid(color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, axes


def _save(figure: "Figure", path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)  # a bare Figure draws with Agg: no display, no global state
    return path
