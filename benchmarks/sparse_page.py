"""``docs/benchmarks/shira.md``: sparse adapters, from their results."""

from typing import Any

from benchmarks.markdown import table, targets

Result = dict[str, Any]
WAYS = {"lora": "PEFT LoRA", "sparse": "**ours**", "peft-shira": "PEFT SHiRA", "supertuning": "PEFT Super-Tuning"}


def page(results: dict[str, Result]) -> list[str]:
    """Paragraphs and tables."""
    parts = ["# Sparse adapters", "CPU seconds of one thread; all methods take turns in one run."]
    if "sparse-step" in results:
        parts += _step(results["sparse-step"])
    if "sparse-switch" in results:
        parts += _switch(results["sparse-switch"])
    return parts


def _step(result: Result) -> list[str]:
    parts = [
        f"## {result['title']}",
        f"Density {result['density']:.0%}, LoRA of rank {result['r']}. A step is forward, backward, AdamW. *Counted* "
        "are the trained parameters, the optimizer's state, what autograd saves and the positions, each storage once, "
        "without the frozen model. *Peak*: resident memory above the loaded model and all imports, in an own process.",
    ]
    for row in result["rows"]:
        rows = [
            [
                WAYS[way["way"]], f"{way['trained']:,}", f"{way['cpu_seconds']:.3g}", f"{way['cpu_share_of_lora']:.2f}",
                f"{way['counted_bytes'] / 1e6:.1f} MB", f"{way['counted_share_of_lora']:.2f}",
                f"{way['peak_mb_above_model']:.0f} MB",
            ]
            for way in row["ways"]
        ]  # fmt: skip
        header = [row["model"], "trained", "CPU s", "of LoRA's", "counted", "of LoRA's", "peak"]
        parts.append(table(header, rows))
    return [*parts, targets(result)]


def _switch(result: Result) -> list[str]:
    parts = [
        f"## {result['title']}",
        f"From one fused adapter to another in all layers; LoRA's rank is {result['rank']}. *Bit-exact* is ours, "
        "*sums* subtracts and adds. A switch overwrites the values of both adapters: twice *the values alone* is its "
        "floor.",
    ]
    names = [way["way"] for way in result["rows"][0]["ways"]]
    header = ["", *(f"{row['layers']} of {row['width']}, {row['density']:.1%}" for row in result["rows"])]
    cells = [{way["way"]: way for way in row["ways"]} for row in result["rows"]]
    rows = [
        [name, *(f"{1e3 * of[name]['cpu_seconds']:.1f} ms, {of[name]['times_faster_than_lora']:.1f}x" for of in cells)]
        for name in names
    ]
    drifts = [
        [
            drift["dtype"],
            *(f"{found['share']:.2%}, up to {found['most']:.1g}" for found in drift["changed"].values()),
        ]
        for drift in result["drift"]
    ]
    switches = result["drift"][0]["switches"]
    return [
        *parts,
        table(header, rows),
        f"Weights that aren't the base model's any more after {switches:,} random switches among ten adapters:",
        table(["", *result["drift"][0]["changed"]], drifts),
        targets(result),
    ]
