"""``docs/benchmarks/serving.md``: many adapters in one batch, from their results."""

from typing import Any

from benchmarks.markdown import table, targets

Result = dict[str, Any]


def page(results: dict[str, Result]) -> list[str]:
    """Paragraphs and tables."""
    parts = [
        "# Many adapters in one batch",
        "CPU seconds of one thread; all ways take turns in one run, and ratios are medians over its rounds. Members "
        "are drawn on the directions that the bank stores, so they have no private part unless it is said: how much "
        "of one members have is a matter of the family, and `engine.report()` tells. *Gathered LoRA* copies each "
        "row's factors together and multiplies, which punica's and vLLM's kernels do in one pass. *Setting* is what a "
        "batch of other members costs once, before its steps.",
    ]
    if "serving-layer" in results:
        parts += _layer(results["serving-layer"])
    if "serving-decoder" in results:
        parts += _decoder(results["serving-decoder"])
    return parts


def _layer(result: Result) -> list[str]:
    rows = [
        [
            way["way"], f"{1e3 * way['cpu_seconds']:.2f} ms", f"{way['of_base']:.2f}",
            f"{1e3 * way['setting_seconds']:.2f} ms",
            "" if way["private_work"] is None else f"{way['private_work']:.0%}",
        ]
        for way in result["ways"]
    ]  # fmt: skip
    return [
        f"## {result['title']}",
        f"A linear layer of {result['d']} x {result['d']}, {result['members']:,} members of rank {result['r']}, "
        f"{result['rows']} rows of one token with as many different members, others in every one of {result['rounds']} "
        "rounds.",
        table(["", "step", "of the base", "setting", "private work"], rows),
        targets(result),
    ]


def _decoder(result: Result) -> list[str]:
    parts = [
        f"## {result['title']}",
        f"A Llama of {result['parameters'] / 1e6:.0f} M values, query and value of {result['layers'] // 2} layers, "
        f"{result['members']} members of rank {result['r']} on {result['k']} directions; PEFT has as many adapters "
        "loaded as there are rows (`adapter_names`).",
    ]
    for shape in result["shapes"]:
        rows = [
            [
                way["way"], f"{1e3 * way['cpu_seconds']:.0f} ms", f"{way['of_base']:.3f}",
                f"{1e3 * way['setting_seconds']:.1f} ms",
            ]
            for way in shape["ways"]
        ]  # fmt: skip
        before = f", {shape['context']} before" if shape["context"] else ""
        what = f"{shape['name']}, {shape['rows']} rows x {shape['tokens']} tokens{before}"
        parts.append(table([what, "step", "of the base", "setting"], rows))
    return [*parts, targets(result)]
