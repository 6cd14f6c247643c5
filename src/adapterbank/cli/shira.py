"""Commands on sparse adapters: shira info, fuse, switch and export; shira mask is in ``cli/masks.py``."""

from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from adapterbank.cli.app import AllowPickle, Json, count, fail, print_json, print_table, say

shira = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="""Sparse adapters: one or two per cent of a model's weights, changed in place.

    Example: adapterbank shira info adapters/law
    """,
)

Adapter = Annotated[str, typer.Argument(metavar="ADAPTER", help="Directory, file or hub id.")]
Adapters = Annotated[
    list[str],
    typer.Argument(metavar="ADAPTER", help="Directories, files or hub ids; NAME=PATH gives another name."),
]
Base = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="Directory or hub id of the base model; PEFT's own files need it."),
]
Out = Annotated[
    Path,
    typer.Option("--out", "-o", metavar="OUT", help="A new or empty directory, or an adapter's, which is replaced."),
]


class Mask(str, Enum):
    """A rule for which weights of a layer are changed."""

    wm = "wm"
    rand = "rand"
    struct = "struct"
    grad = "grad"
    snip = "snip"


class Overlap(str, Enum):
    """What a position gets that several adapters change."""

    sum = "sum"
    mean = "mean"
    last = "last"
    largest = "largest"


class Kind(str, Enum):
    """A form that other tools read."""

    shira = "shira"
    supertuning = "supertuning"
    lora = "lora"


@shira.command()
def info(adapters: Adapters, model: Base = None, allow_pickle: AllowPickle = False, as_json: Json = False) -> None:
    """Show what sparse adapters change, and share: ours, or PEFT's SHiRA or Super-Tuning.

    Example: adapterbank shira info adapters/law
    """
    deltas = _open_all(adapters, model, allow_pickle)
    if len(deltas) == 1:
        _show_one(*deltas.values(), as_json=as_json)
    else:
        _show_several(deltas, as_json=as_json)


def _show_one(delta: Any, *, as_json: bool) -> None:
    layers = {name: len(update.positions) for name, update in delta.updates.items()}
    found = {
        "name": delta.name, "base": delta.base, "mask": delta.mask, "values": delta.nnz, "density": delta.density,
        "parameters": layers, "heads": sorted(delta.extras),
        "knows_its_base": all(update.fingerprint is not None for update in delta.updates.values()),
    }  # fmt: skip
    if as_json:
        print_json(found)
        return
    rows = [
        (name, f"{update.shape[0]} x {update.shape[1]}", f"{len(update.positions):,}", f"{update.density:.2%}")
        for name, update in delta.updates.items()
    ]
    rows.append(("all", "", f"{delta.nnz:,}", f"{delta.density:.2%}"))
    print_table(f"Adapter {delta.name}", ("parameter", "shape", "values", "density"), rows, last=1)
    known = "It knows its base again." if found["knows_its_base"] else "It has no fingerprint of its base."
    say(f"Of {delta.base or 'an unnamed base'}, mask {delta.mask or 'unknown'}. {known}")


def _show_several(deltas: dict[str, Any], *, as_json: bool) -> None:
    from adapterbank.shira import crowding, overlaps

    shared = overlaps(deltas)
    advice = crowding(shared)
    if as_json:
        told = [
            {"name": name, "base": d.base, "mask": d.mask, "values": d.nnz, "density": d.density}
            for name, d in deltas.items()
        ]
        print_json({"adapters": told, "overlap": shared, "advice": advice})
        return
    rows = [
        (name, d.base or "unnamed", d.mask or "unknown", f"{d.nnz:,}", f"{d.density:.2%}",
         *(f"{shared[name][other]:.1%}" if other != name else "" for other in deltas))
        for name, d in deltas.items()
    ]  # fmt: skip
    columns = ("adapter", "base", "mask", "values", "density", *(f"in {name}" for name in deltas))
    print_table("Adapters, and the share of positions that two have in common", columns, rows)
    say(*([advice] if advice else []))


@shira.command()
def fuse(
    adapters: Adapters,
    out: Out,
    weight: Annotated[
        list[str] | None, typer.Option(metavar="NAME=W", help="Strength of an adapter; may be given several times.")
    ] = None,
    overlap: Annotated[
        Overlap, typer.Option(help="Of values that several adapters have at one position.")
    ] = Overlap.sum,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw common positions and distances into this SVG.")
    ] = None,
    model: Base = None,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
) -> None:
    """Fuse sparse adapters into one, and show how much they are in each other's way.

    Example: adapterbank shira fuse adapters/law adapters/news -o both --weight news=0.5
    """
    from itertools import combinations

    from adapterbank.shira import crowding, distances, draw_matrices, interference, overlaps
    from adapterbank.shira import fuse as fuse_them

    deltas = _open_all(adapters, model, allow_pickle)
    fused = fuse_them(deltas, weights=_weights(weight or []), overlap=overlap.value)
    pairs = {pair: interference(*(deltas[name] for name in pair)) for pair in combinations(deltas, 2)}
    shared = overlaps(deltas)
    advice = crowding(shared)
    if picture:
        drawn = draw_matrices({"share of common positions": shared, "distance": distances(deltas)})
        picture.write_text(drawn, encoding="utf-8")
    fused.save(out)
    if as_json:
        told = [{"between": list(pair), **vars(found)} for pair, found in pairs.items()]
        print_json({
            "out": str(out), "values": fused.nnz, "density": fused.density, "interference": told, "advice": advice,
            "picture": None if picture is None else str(picture),
        })  # fmt: skip
        return
    say(f"Wrote {out}: {fused.nnz:,} values, {fused.density:.2%} of {count(len(fused.updates), 'parameter')}.")
    rows = [
        (f"{one}, {other}", f"{x.overlap:.1%}", f"{x.awom:.3g}", f"{x.awor:.3f}", f"{x.distance:.3g}")
        for (one, other), x in pairs.items()
    ]
    if rows:
        print_table("Interference", ("adapters", "overlap", "AWOM", "AWOR", "distance"), rows)
    say(*([advice] if advice else []), *([f"Drew {picture}."] if picture else []))


@shira.command()
def switch(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Directory of a model in safetensors files.")],
    adapter: Annotated[
        str | None, typer.Argument(metavar="[ADAPTER]", help="Directory, file or hub id; without it nothing changes.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="OUT", help="Copy MODEL to this new directory first.")
    ] = None,
    restore: Annotated[bool, typer.Option("--restore", help="Bring back the base model.")] = False,
    alpha: Annotated[float, typer.Option(metavar="A", help="Strength of the adapter.")] = 1.0,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
) -> None:
    """Put a sparse adapter into a model's own files, in the place of the one that is there.

    Only the values that change are written. What they were is kept in MODEL/adapterbank.base, so that the base model
    comes back bit for bit. A task head is not put in. Stop what runs on these files first.

    Example: adapterbank shira switch models/base adapters/law -o models/law
    """
    import shutil

    from adapterbank.adapters.names import split_name
    from adapterbank.shira import SparseDelta
    from adapterbank.shira.model_files import active_in, copy_model, skeleton, switch_files

    if restore and adapter is not None:
        fail("give an adapter, or --restore")
    delta = None
    if adapter is not None:
        name, path = split_name(adapter)
        delta = SparseDelta.load(path, name=name, model=skeleton(model), allow_pickle=allow_pickle)
    if out is not None:
        copy_model(model, out)
    place = out or model
    try:
        before = switch_files(place, delta, alpha=alpha) if delta is not None or restore else active_in(place)
    except BaseException:
        if out is not None:  # a copy without what was asked for
            shutil.rmtree(out, ignore_errors=True)
        raise
    now = delta.name if delta is not None else None if restore else before
    left_out = sorted(delta.extras) if delta is not None else []
    if as_json:
        print_json({"model": str(place), "before": before, "adapter": now, "left_out": left_out})
        return
    say(f"{place} holds {repr(now) if now else 'the base model'}.")
    if left_out:
        say(f"Left out, as task heads are: {', '.join(left_out)}.")


@shira.command()
def export(
    adapter: Adapter,
    out: Out,
    kind: Annotated[Kind, typer.Option("--as", help="PEFT's SHiRA or Super-Tuning, or the nearest LoRA.")],
    r: Annotated[int, typer.Option("-r", metavar="R", help="Rank of the LoRA.")] = 32,
    model: Base = None,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
) -> None:
    """Write a sparse adapter in a form that other tools read.

    Sparse updates are of high rank, so a LoRA of them loses much; how much is said.

    Example: adapterbank shira export adapters/law -o law-peft --as supertuning
    """
    from adapterbank.shira import save_as_shira, save_as_supertuning

    delta, told = _open(adapter, model, allow_pickle), dict[str, Any]()
    if kind is Kind.lora:
        lora, errors = delta.to_lora(r)
        lora.save(out)
        told = {"largest_error": max(errors.values())}
    else:
        {Kind.shira: save_as_shira, Kind.supertuning: save_as_supertuning}[kind](delta, out)
    if as_json:
        print_json({"out": str(out), "as": kind.value, **told})
        return
    lost = f"; the update's largest error is {told['largest_error']:.3f}" if told else ""
    say(f"Wrote {out} as {kind.value}{lost}.")


def _open(adapter: str, model: str | None, allow_pickle: bool) -> Any:
    from adapterbank.adapters.names import split_name
    from adapterbank.shira import SparseDelta

    name, path = split_name(adapter)
    base = None if model is None else base_model(model)
    return SparseDelta.load(path, name=name, model=base, allow_pickle=allow_pickle)


def _open_all(adapters: list[str], model: str | None, allow_pickle: bool) -> dict[str, Any]:
    deltas = {delta.name: delta for delta in (_open(adapter, model, allow_pickle) for adapter in adapters)}
    if len(deltas) < len(adapters):
        fail("two adapters have one name; give another as NAME=PATH")
    return deltas


def base_model(model: str, *, weights: bool = False) -> Any:
    """The base model; without its weights where only shapes are asked for."""
    if find_spec("transformers") is None:
        fail("reading a base model needs transformers: pip install 'adapterbank[peft]'")
    import torch
    import transformers
    from transformers.utils import logging

    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # its own, which a file would get too
    try:
        config = transformers.AutoConfig.from_pretrained(model)
        # as it was saved: then its layers have the names that they have in training
        kind: Any = getattr(transformers, (config.architectures or [""])[0], None)
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            kind = transformers.AutoModel
        if weights:
            return kind.from_pretrained(model, dtype="auto")
        with torch.device("meta"):
            return kind.from_config(config) if kind is transformers.AutoModel else kind(config)
    except (OSError, ValueError, ImportError) as error:
        fail(f"{model} can't be loaded as a base model: {str(error).strip().splitlines()[0]}")
    finally:
        if bar:
            logging.enable_progress_bar()


def _weights(given: list[str]) -> dict[str, float]:
    found = {}
    for item in given:
        name, _, value = item.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            fail(f"--weight {item}: give NAME=NUMBER")
    return found
