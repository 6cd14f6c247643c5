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
    if "serving-tokens" in results:
        parts += _tokens(results["serving-tokens"])
    if "serving-sparse" in results:
        parts += _sparse(results["serving-sparse"])
    if "serving-growth" in results:
        parts += _growth(results["serving-growth"])
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


def _tokens(result: Result) -> list[str]:
    rows = [
        [
            f"{way['bits']} bits", f"{way['logits_from_one']:.1e}", f"{way['logits_from_peft']:.1e}",
            f"{way['logits_from_unpadded']:.1e}", str(way["tokens_from_alone"]), str(way["tokens_from_peft"]),
            f"{way['bytes'] / 1e6:.1f} MB", f"{way['private_work']:.0%}",
        ]
        for way in result["ways"]
    ]  # fmt: skip
    columns = [
        "a value has", "logits, from one member for all rows", "from PEFT", "from PEFT, row by row",
        "rows with other tokens than alone", "than PEFT's", "the engine holds", "private work",
    ]  # fmt: skip
    return [
        f"## {result['title']}",
        f"SmolLM2-135M in float32, a bank of {result['members']} LoRAs of rank 8, each trained on a task of its own "
        f"from a private seed (largest error {result['bank_error']:.3f}), and {result['sparse']} sparse adapter of "
        f"{result['density']:.0%}. One batch of {result['rows']} rows: {result['prompts']} prompts of each task, each "
        "for its member, for the sparse one where there is one, and for the base model. It is compared with the same "
        "batch where all rows have one member, with PEFT on the exported adapters (sparse: in the weights), and with "
        f"each row by itself, without padding. {result['new_tokens']} tokens are decoded greedily; the adapters change "
        f"them in {result['changed']} of {result['adapted']} rows. Padding and the size of the batch alone move the "
        f"base model's logits, of up to {result['largest_logit']:.0f}, by {result['base_logits_from_unpadded']:.1e}: "
        "values of 32 bits are as near to PEFT as that, those of 16 bits, the default, a few times as far.",
        table(columns, rows),
        targets(result),
    ]


def _sparse(result: Result) -> list[str]:
    rows = []
    for shape in result["shapes"]:
        ways = {way["way"]: way for way in shape["ways"]}
        ours = ways["ours"]
        rows.append([
            f"{shape['adapters']} adapters, {shape['tokens']} tokens a row",
            f"{1e3 * ways['base']['cpu_seconds']:.1f} ms",
            f"{1e3 * ours['cpu_seconds']:.1f} ms", f"{ours['of_base']:.2f}", f"{1e3 * ours['setting_seconds']:.1f} ms",
            f"{1e3 * ways['switching']['cpu_seconds']:.1f} ms", f"{ways['switching']['of_base']:.2f}",
        ])  # fmt: skip
    return [
        f"## {result['title']}",
        f"{result['layers']} layers of {result['d']} x {result['d']}, {result['rows']} rows, adapters that change "
        f"{result['density']:.0%} of the weights. *Switching* puts each adapter of the batch into the weights in turn, "
        "and sends its rows through the model.",
        table(["", "base", "ours", "of the base", "setting", "switching", "of the base"], rows),
    ]


def _growth(result: Result) -> list[str]:
    step, stack, planned, sizes = result["step"], result["stack"], result["planned"], result["bytes"]
    steps = [
        [
            f"{row['members']:,}", f"{1e3 * row['step_seconds']:.2f} ms", f"{row['of_fewest']:.2f}",
            f"{1e3 * row['add_seconds']:.2f} ms",
        ]
        for row in result["steps"]
    ]  # fmt: skip
    loading = [
        [f"{LOADING[row['way']]}, {row['members']:,} members", f"{row['seconds']:.1f} s",
         f"{1e3 * row['seconds'] / row['members']:.0f} ms"]
        for row in result["loading"]
    ]  # fmt: skip
    ways = list(result["working_sets"][0]["seconds"])
    asked = [
        [f"{row['members']:,}", *(f"{1e3 * row['seconds'][way]:.1f} ms" for way in ways)]
        for row in result["working_sets"]
    ]
    return [
        f"## {result['title']}",
        f"A step of one layer, {step['d']} wide, {step['rows']} rows of as many other members every time, with the "
        f"setting of the rows; rank {step['r']} on {step['k']} directions. *Adding* is one more member into a running "
        "engine.",
        table(["members", "step", f"of that at {result['steps'][0]['members']}", "adding"], steps),
        f"From disk to ready, {stack['layers']} layers of {stack['d']}, rank {stack['r']}. A bank fitted to a ratio is "
        "decoded; what its directions can't hold of a member is found then.",
        table(["", "CPU time", "each"], loading),
        f"Requests of one row for members in random order, out of so many; {result['requests'] // 2} of them, after as "
        "many to warm up; means, all ways in turns. *Memory for a tenth* holds 100 members and reads the others from "
        "the bank each time, or maps them from the engine's cache on disk; PEFT loads each from its directory into one "
        "slot (`hotswap_adapter`).",
        "![CPU time of a request by working set](../pictures/serving-working-set.svg)",
        table(["members asked for", *ways], asked),
        f"{planned['members']:,} members of rank {planned['r']} in a model of {planned['layers']} adapted layers, "
        f"{planned['d']} wide, on {planned['k']} directions: {sizes['measured_bytes'] / 1e9:.3g} GB, planned "
        f"{sizes['planned_bytes'] / 1e9:.3g} GB; as full adapters at 16 bits {sizes['full_bytes'] / 1e9:.3g} GB. "
        f"Adding one of rank {planned['r']} to a running engine takes {_added(result['added'])}.",
        targets(result),
    ]


def _added(rows: list[Result]) -> str:
    return " and ".join(f"{1e3 * row['seconds']:.0f} ms in {row['name']} ({row['layers']} layers)" for row in rows)


LOADING = {"compact": "compact bank", "by ratio": "bank fitted to a ratio of 16", "PEFT": "PEFT, `load_adapter`"}
