"""``docs/benchmarks/shira.md``: sparse adapters, from their results."""

from collections.abc import Callable
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
    if "sparse-orthogonality" in results:
        parts += _orthogonality(results["sparse-orthogonality"])
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
    parts += [
        "![CPU time of a switch by density and by width](../pictures/sparse-switch.svg)",
        *(_switch_table(rows, "ways", _beside_lora) for rows in by_density_and_width(result["rows"])),
    ]
    if all("overwrites" in row for row in result["rows"]):
        parts += [
            "Ways to do the two overwrites of a switch, without anything else, and how far from the floor. Positions "
            "take 8 bytes a value in int64, 4 in int32.",
            *(_switch_table(rows, "overwrites", _beside_floor) for rows in by_density_and_width(result["rows"])),
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
        f"Weights that aren't the base model's any more after {switches:,} random switches among ten adapters:",
        table(["", *result["drift"][0]["changed"]], drifts),
        targets(result),
    ]


def _orthogonality(result: Result) -> list[str]:
    sizes = sorted({row["size"] for row in result["rows"]})
    found = {(row["kind"], row["size"]): row for row in result["rows"]}
    kinds = list(dict.fromkeys(row["kind"] for row in result["rows"]))

    def rows_of(told: Callable[[Result], str]) -> list[list[str]]:
        return [[kind, *(told(found[kind, size]) if (kind, size) in found else "" for size in sizes)] for kind in kinds]

    seeds = ", ".join(f"{row['seeds']} at {row['size']}" for row in result["rows"] if row["kind"] == "wm, one mask")
    fewest = min(row["seeds"] for row in result["rows"] if row["kind"] == "dense")
    header = [f"{size:,}" for size in sizes]
    return [
        f"## {result['title']}",
        f"Two adapters of one random square layer that change {result['density']:.0%} of it, with Gaussian values, by "
        "mask and by size: figures 4 and 9 of the SHiRA paper. AWOR is the share of zeros in `S1^T S2`, more is "
        f"better; means over seeds ({seeds}; {fewest} of the dense ones). LoRA has rank {result['rank']}; the sparse "
        f"one's factors have {result['factor_density']:.0%} of their values, which leaves few zeros in the product. "
        "Masks that share nothing don't make WM any better than one mask for all, as in the paper; two struct "
        "masks of the same rows have no zeros at all.",
        "![AWOR by mask and size](../pictures/sparse-orthogonality.svg)",
        table(["AWOR", *header], rows_of(lambda row: f"{row['awor']:.3f} ± {row['awor_spread']:.3f}")),
        "AWOM, the norm of `S1^T S2`, over the norms of both adapters: less is better. Only struct's own rows "
        "stand out: WM has what any random adapters have, dense ones too.",
        table(["AWOM", *header], rows_of(lambda row: f"{row['awom_share']:.3f}")),
    ]


def by_density_and_width(rows: list[Result]) -> tuple[list[Result], list[Result]]:
    """Rows of the first one's width, and those of its density, each ascending."""
    densities = [row for row in rows if row["width"] == rows[0]["width"]]
    widths = [row for row in rows if row["density"] == rows[0]["density"]]
    return sorted(densities, key=lambda row: row["density"]), sorted(widths, key=lambda row: row["width"])


def _switch_table(rows: list[Result], what: str, cell: Callable[[Result], str]) -> str:
    header = ["", *(f"{row['layers']} of {row['width']}, {100 * row['density']:g} %" for row in rows)]
    cells = [{way["way"]: cell(way) for way in row[what]} for row in rows]
    return table(header, [[way, *(of[way] for of in cells)] for way in cells[0]])


def _beside_lora(way: Result) -> str:
    return f"{_milliseconds(way)}, {way['times_faster_than_lora']:.1f}x"


def _beside_floor(way: Result) -> str:
    return f"{_milliseconds(way)}, {way['over_floor']:.2f}"


def _milliseconds(way: Result) -> str:
    found = 1e3 * way["cpu_seconds"]
    return f"{found:.{0 if found >= 100 else 1 if found >= 10 else 2}f} ms"
