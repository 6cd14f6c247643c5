"""The command that shows masks: shira mask."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from adapterbank.cli.app import Json, fail, print_json, print_table, say
from adapterbank.cli.shira import Mask, base_model

STEPS = {Mask.wm: "part", Mask.struct: "offset", Mask.rand: "seed"}
"""What differs within a family."""


def show(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory or hub id of the base model.")],
    mask: Annotated[Mask, typer.Option(help="Which weights; grad and snip need the task's data.")] = Mask.wm,
    density: Annotated[float, typer.Option(metavar="P", help="Share of each layer's weights.")] = 0.01,
    part: Annotated[int, typer.Option(metavar="I", help="Of wm: 0 for the largest, 1 for the next as many.")] = 0,
    offset: Annotated[int, typer.Option(metavar="ROW", help="Of struct: the first row.")] = 0,
    seed: Annotated[int, typer.Option(metavar="N", help="Of rand.")] = 0,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="PATTERN",
            help="Regular expression that a layer's name holds. By default what LoRA adapts in this model, or all "
            "linear layers.",
        ),
    ] = None,
    adapters: Annotated[
        int, typer.Option(metavar="N", help="How many will be fused: the next parts, offsets or seeds are drawn too.")
    ] = 1,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw one layer of each kind into this SVG.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a mask takes of a model's layers, and how many adapters fit side by side.

    Example: adapterbank shira mask org/base --mask struct --adapters 3 --picture masks.svg
    """
    from adapterbank.shira import room
    from adapterbank.shira.masks import choose

    kinds = _kinds(_layers(base_model(model, weights=mask is Mask.wm), layers))
    options: dict[str, Any] = {"part": part, "offset": offset, "seed": seed}
    # layers of a kind are equally large, so their masks are
    values = {kind.name: len(choose(mask.value, kind.weight, density, **options)) for kind in kinds}
    there = room([kind.shape for kind in kinds], density)
    advice = there.advice(adapters)
    if picture:
        _draw(kinds, mask, density, options, adapters, picture)
    total = sum(values[kind.name] * len(kind.layers) for kind in kinds)
    share = total / sum(kind.weight.numel() * len(kind.layers) for kind in kinds)
    if as_json:
        told = [{"name": k.name, "layers": k.layers, "shape": k.shape, "values": values[k.name]} for k in kinds]
        print_json({
            "model": model, "mask": mask.value, "values": total, "density": share, "kinds": told, "parts": there.parts,
            "offsets": there.offsets, "advice": advice, "picture": None if picture is None else str(picture),
        })  # fmt: skip
        return
    rows = [
        (kind.name, len(kind.layers), f"{kind.shape[0]} x {kind.shape[1]}", f"{values[kind.name]:,}",
         f"{values[kind.name] / kind.weight.numel():.2%}")
        for kind in kinds
    ]  # fmt: skip
    rows.append(("all", sum(len(kind.layers) for kind in kinds), "", f"{total:,}", f"{share:.2%}"))
    print_table(f"Mask {mask.value} in {model}", ("kind", "layers", "shape", "values each", "density"), rows, last=1)
    say(advice, *([f"Drew {picture}."] if picture else []))


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """Layers whose names differ in numbers alone, of one shape."""

    name: str
    layers: list[str]
    weight: Any
    """Of the first one."""

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.weight.shape[0]), int(self.weight.shape[1])


def _layers(model: Any, pattern: str | None) -> dict[str, Any]:
    """Weights of the linear layers that are asked for, by the layers' names."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TARGETS
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    linear = {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module.weight.is_floating_point()
    }
    if not linear:
        fail("the model has no linear layers with weights of their own; load the base unquantised")
    if pattern is None:
        usual = TARGETS.get(model.config.model_type, ())
        return {name: weight for name, weight in linear.items() if name.rpartition(".")[2] in usual} or linear
    try:
        found = {name: weight for name, weight in linear.items() if re.search(pattern, name)}
    except re.error as error:
        fail(f"--layers {pattern} is no regular expression: {error}")
    if not found:
        fail(f"--layers {pattern}: no linear layer has it in its name; the first is {next(iter(linear))}")
    return found


def _kinds(weights: dict[str, Any]) -> list[_Kind]:
    groups = dict[tuple[str, Any], list[str]]()
    for name, weight in weights.items():
        groups.setdefault((re.sub(r"(?<![^.])\d+(?![^.])", "*", name), weight.shape), []).append(name)
    shapes, found = Counter(name for name, _ in groups), []
    for (name, shape), layers in groups.items():
        if len(layers) == 1:
            name = layers[0]
        elif shapes[name] > 1:
            name = f"{name} of {shape[0]} x {shape[1]}"
        found.append(_Kind(name=name, layers=layers, weight=weights[layers[0]]))
    return found


def _draw(
    kinds: list[_Kind], mask: Mask, density: float, options: dict[str, Any], adapters: int, picture: Path
) -> None:
    from adapterbank.shira import draw_masks
    from adapterbank.shira.masks import choose

    masks, shapes, step = dict[str, Any](), dict[str, tuple[int, int]](), STEPS[mask]
    for kind in kinds:
        for number in range(options[step], options[step] + adapters):
            label, own = f"{kind.name}, {step} {number}", {**options, step: number}
            masks[label] = choose(mask.value, kind.weight, density, name=kind.layers[0], **own)
            shapes[label] = kind.shape
    picture.write_text(draw_masks(masks, shapes, title=f"Mask {mask.value}, density {density:g}"), encoding="utf-8")
