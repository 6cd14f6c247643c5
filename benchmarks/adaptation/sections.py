"""The page's further sections: what decides, and what was not in the papers."""

from statistics import mean
from typing import Any

from benchmarks.adaptation.analysis import Part
from benchmarks.adaptation.results import load_results
from benchmarks.adaptation.words import counted, kilobytes, rates, signed
from benchmarks.markdown import table

LORA = "LoRA r=8"
TASKS = {
    "reuters-r8": "R8", "tweets": "tweets", "rotten-tomatoes": "rt", "spam": "spam", "intent": "intent",
    "fever": "fever",
}  # fmt: skip
PAPERS_TABLE_1 = {"head": ".9007", "LoRA r=4": ".9379", "LoRA r=1": ".9245", "bank, k=2": ".948"}
"""EigenLoRAx on CIFAR-100; its base model stands beside our head."""
FAMILIES = {"private": "private seeds", "oneseed": "one seed"}
KINDS = ("bank", "random", "gradient")
"""Of directions."""
HEAD_RATES = (3.33e-3, 1e-2, 3e-2)
"""Beside which several rates of LoRA's own were tried."""


def further_sections(main: Part) -> list[str]:
    """All that there are results for."""
    return [
        *_bytes(),
        *_ablation(),
        *_shared(),
        *_one_seed(main),
        *_amounts(),
        *_directions(),
        *_banks(),
        *_appendix(),
        *_protocol(),
        *_vision(),
        *_language(),
    ]


def bank_told(subject: str, of: str = "all sources") -> str:
    """How large the bank is."""
    for line in load_results("banks").values():
        if line["subject"] == subject and line["sources"]["family"] == "private":
            held = line["result"]
            return (
                f"The bank of {of} holds {held['adapters']} adapters in {kilobytes(held['bytes'])}, with a relative "
                f"error of {held['error']:.3f}."
            )
    return ""


def _bytes() -> list[str]:
    part = Part.read("bytes")
    if not part.has(LORA):
        return []
    joined = {name: list(part.of(name, "joined").values()) for name in part.cells}
    promises = [at["max_error"] for at in joined[LORA][0]]
    rows = []
    for name in sorted(joined, key=lambda name: mean(cell[0]["bytes"] for cell in joined[name])):
        row = [name, kilobytes(part.mean(name, "stored_bytes")), f"{part.mean(name):.3f}"]
        for i in range(len(promises)):
            at = [cell[i] for cell in joined[name]]
            row += [kilobytes(mean(x["bytes"] for x in at)), f"{mean(x['accuracy'] for x in at):.3f}"]
        rows.append(row)
    header = ["", "stored as trained", "accuracy"]
    for promise in promises:
        header += [f"as a member at error {promise:g}", "accuracy"]
    return [
        "## At equal bytes",
        "What a task takes beside its head: as PEFT saves it, and as a member of the bank (`Bank.add`, `max_error`), "
        f"with the accuracy of what comes back; {', '.join(part.tasks)}, one seed. A task whose directions the bank "
        "can derive or draw again is only coefficients; one with directions of its gradient is coded like a LoRA, and "
        f"takes as much. {bank_told(part.lines[0]['subject'])} It is needed for all of these but is there already.",
        table(header, rows),
    ]


def _ablation() -> list[str]:
    part = Part.read("main", "ablation")
    outside, related = part.on(TASKS), part.on(set(part.tasks) - set(TASKS))
    if not related.has("bank + gradient", "random + gradient", "gradient"):
        return []
    rows = [
        [
            name, f"{part.mean(name, 'trained'):,.0f}", f"{outside.mean(name):.3f}", f"{outside.final_loss(name):.3f}",
            f"{related.mean(name):.3f}", f"{related.final_loss(name):.3f}",
        ]
        for name in related.cells
    ]  # fmt: skip
    pairs = [
        ("directions, alone", "bank", "random"),
        ("directions, beside the gradient's", "bank + gradient", "random + gradient"),
        ("directions, in place of the gradient's", "bank + gradient", "gradient"),
        ("the start", "bank + gradient, mean start", "bank + gradient"),
        ("start and directions", "bank + gradient, mean start", "gradient"),
        ("the start without directions", "gradient, mean merged", "gradient"),
        ("directions beside that start", "bank + gradient, mean start", "gradient, mean merged"),
    ]
    shares = [
        [what, f"{ours} − {theirs}", *(
            signed(gap) for among in (outside, related)
            for gap in (among.difference(ours, theirs), among.loss_difference(ours, theirs))
        )]
        for what, ours, theirs in pairs if related.has(ours, theirs)
    ]  # fmt: skip
    header = ["outside: accuracy", "validation loss", "related: accuracy", "validation loss"]
    return [
        "## What the bank itself adds",
        "Outside the bank are the six tasks above; related are sources that were left out of the bank in turn "
        f"({', '.join(related.tasks)}). 16 + 16 directions or 32 of one kind. {len(outside.cells['gradient'])} cells "
        f"of tasks outside and {len(related.cells['gradient'])} of related ones.",
        table(["", "trained", *header], rows),
        "What the bank gives, taken apart:",
        table(["", "compared", *header], shares),
    ]


def spectra() -> dict[str, dict[str, Any]]:
    """Spectra of the text tasks' source adapters by family, and of random directions."""
    lines = [line for line in load_results("banks").values() if line["subject"] == "encoder"]
    found = {FAMILIES[line["sources"]["family"]]: line["result"]["spectrum"] for line in lines}
    return {**found, "random directions": lines[0]["result"]["turned"]} if lines else {}


def _shared() -> list[str]:
    found = spectra()
    if not found:
        return []
    counts, rows_a_side = (found["random directions"][name] for name in ("directions", "rows"))
    rows = [
        [name, side, *(f"{share:.2f}" for share in spectrum[side]["mean"])]
        for name, spectrum in found.items()
        for side in ("in", "out")
    ]
    return [
        "## What the source adapters share",
        f"Share of the energy of all members' factors ({rows_a_side} rows a side, balanced, so that it doesn't depend "
        "on how an update is divided between A and B) that the first so many directions of a layer hold, the mean over "
        "the layers. *Random directions*: updates with the same singular values as those of private seeds, turned at "
        "random, which share nothing.",
        "![Share of energy by number of directions](../pictures/adaptation-spectrum.svg)",
        table(["", "side", *map(str, counts)], rows),
    ]


def _one_seed(main: Part) -> list[str]:
    part = Part.read("oneseed")
    main = main.as_seen_by(part)
    names = [name for name in part.cells if name in main.cells]
    if not names:
        return []
    rows = [
        [name, f"{main.mean(name):.3f}", f"{main.final_loss(name):.3f}", f"{part.mean(name):.3f}",
         f"{part.final_loss(name):.3f}"]
        for name in names
    ]  # fmt: skip
    header = ["", "private seeds: accuracy", "validation loss", "one seed: accuracy", "validation loss"]
    return [
        "## Source adapters that start from one seed",
        f"As the main table, {len(part.tasks)} tasks and one seed; these source adapters were all trained from one "
        "random start.",
        table(header, rows),
    ]


def _amounts() -> list[str]:
    parts = []
    for name, title, rates_of in (
        ("few-data", "48 examples, 30 steps", "rates of its own"),
        ("more-data", "2,000 examples, 250 steps", "the rates of 320 examples"),
    ):
        part = Part.read(name)
        if not part.has(LORA):
            continue
        groups = {"outside the bank": part.on(TASKS), "related": part.on(set(part.tasks) - set(TASKS))}
        groups = {what: group for what, group in groups.items() if group.lines}
        rows = [
            [method, *(cell for group in groups.values() for cell in (
                f"{group.mean(method):.3f}", "" if method == LORA else signed(group.difference(method, LORA)),
                f"{group.final_loss(method):.3f}",
            ))]
            for method in part.cells
        ]  # fmt: skip
        header = [title]
        for what in groups:
            header += [f"{what}: accuracy", "minus LoRA r=8 ± s.e.", "validation loss"]
        told = " and ".join(f"{len(group.cells[LORA])} cells {what}" for what, group in groups.items())
        parts += [f"{told}; {counted(part.seeds, 'seed')}; {rates_of}.", table(header, rows)]
    return ["## Fewer and more examples", *parts] if parts else []


def _directions() -> list[str]:
    part = Part.read("directions")
    counts = sorted({int(name.split("k=")[1]) for name in part.cells})
    if not part.has(*(f"{kind}, k={k}" for kind in KINDS for k in counts)) or not counts:
        return []
    rows = [
        [
            str(k), f"{part.mean(f'bank, k={k}', 'trained'):,.0f}",
            *(f"{part.mean(f'{kind}, k={k}'):.3f}" for kind in KINDS),
            *(f"{part.final_loss(f'{kind}, k={k}'):.3f}" for kind in KINDS),
        ]
        for k in counts
    ]  # fmt: skip
    header = ["k", "trained", *(f"{kind}: accuracy" for kind in KINDS), *(f"{kind}: validation loss" for kind in KINDS)]
    return [
        "## How many directions",
        f"Mean over {', '.join(part.tasks)}, one seed; rank 8, or k where that is less.",
        "![Validation loss by directions, source adapters, untrained ones](../pictures/adaptation-basis.svg)",
        table(header, rows),
    ]


def _banks() -> list[str]:
    parts = []
    for name, title in (("sources", "source adapters"), ("noise", "untrained among them")):
        part = Part.read(name)
        if part.lines:
            rows = [[method, f"{part.mean(method):.3f}", f"{part.final_loss(method):.3f}"] for method in part.cells]
            parts.append(table([title, "accuracy", "validation loss"], rows))
    where = (
        "16 directions of a bank of so many source adapters, and of one with so many untrained adapters beside all "
        "that were trained."
    )
    return ["## Which bank", where, *parts] if parts else []


def _appendix() -> list[str]:
    part = Part.read("rates", "appendix").at_best_rates()
    rows = [
        [
            name, f"{part.mean(name):.3f}", f"{part.final_loss(name):.3f}", f"{part.mean(name, 'trained'):,.0f}",
            kilobytes(part.mean(name, "stored_bytes")), rates(*part.rates[name]),
        ]
        for name in sorted(part.cells, key=part.final_loss)
    ]  # fmt: skip
    header = ["", "accuracy", "validation loss", "trained", "stored", "rate, head's"]
    return [
        "## Everything that was tried",
        f"One seed, {' and '.join(part.tasks)}, whose validation parts also chose the rates: a first look, in which "
        "accuracies have a standard error of about .015. By validation loss. Methods of the main table had their "
        "head's rate searched too, the others have it at 0.0033. VeRA's bytes are all but 31 kB random projections "
        "that could be drawn again.",
        table(header, rows),
        _head_rates(),
    ]


def _head_rates() -> str:
    part = Part.read("rates")
    tried = {rate: Part([x for x in part.lines if x["method"]["head_lr"] == rate]) for rate in HEAD_RATES}
    best = {rate: found.at_best_rates().final_loss(LORA) for rate, found in tried.items() if found.has(LORA)}
    told = ", ".join(f"{loss:.3f} at {rate:.2g}" for rate, loss in best.items())
    return (
        "The head's rate decides as much as the method: LoRA r=8, at the best of its rates tried beside each, has a "
        f"loss of {told}."
    )


def _protocol() -> list[str]:
    part = Part.read("protocol")
    if not part.has("analytic", "zero-shot", LORA):
        return []
    families = [part.of_family(family) for family in ("private", "oneseed")]
    rows = [[name, *(f"{family.mean(name):.3f}" for family in families)] for name in part.cells]
    return [
        "## The paper's protocol in small",
        f"Four sources in turn ({', '.join(part.tasks)}) play the new task and are left out of the bank; one seed. "
        "*Zero-shot* takes random coefficients and trains the head alone. *Analytic* projects the task's own LoRA, "
        "which was trained as a source, on what the others share (k = 32), and keeps the head that was trained with "
        "it; it stands between that LoRA as it is and that head alone, and beside a projection on as many random "
        "directions. The paper does this with FLAN-T5-large and 53 adapters of LoRAHub (table 3), and reports "
        "zero-shot above the base model and analytic as good as LoRA; here it is MiniLM with twelve adapters.",
        table(["", "private seeds", "one seed"], rows),
    ]


def _vision() -> list[str]:
    part = Part.read("vision")
    if not part.has("head", "LoRA r=4"):
        return []
    return [
        "## A vision model, classes left out in turn",
        "A DINOv2-small-shaped ViT at 56 pixels on five pairs of CIFAR-10's classes, 160 examples, 40 steps, "
        f"{counted(part.seeds, 'seed')}, rates chosen on the first two pairs; the bank holds the adapters of the other "
        f"four. {bank_told('vision', 'all five')} The last column is the paper's aligned setting (table 1): ViT-B on "
        "CIFAR-100, its base model beside our head. It is another model on other data, so only the order compares.",
        _compared(part, "LoRA r=4", ("the paper's", PAPERS_TABLE_1)),
    ]


def _language() -> list[str]:
    part = Part.read("language")
    if not part.has(LORA):
        return []
    return [
        "## A language model, two generative tasks",
        f"SmolLM2-135M, query and value, {' and '.join(part.tasks)}, 320 examples, 24 steps, "
        f"{counted(part.seeds, 'seed')}, rates chosen on {part.tasks[0]}; the bank holds adapters of five other such "
        f"tasks. {bank_told('language', 'all six')} Accuracy is the share of answers that greedy decoding would give "
        "exactly.",
        _compared(part, LORA),
    ]


def _compared(part: Part, reference: str, beside: tuple[str, dict[str, str]] | None = None) -> str:
    rows = [
        [
            name, f"{part.mean(name):.3f}", "" if name == reference else signed(part.difference(name, reference)),
            f"{part.final_loss(name):.3f}", f"{part.mean(name, 'trained'):,.0f}",
            *([beside[1].get(name, "")] if beside else []),
        ]
        for name in sorted(part.cells, key=lambda name: -part.mean(name))
    ]  # fmt: skip
    header = ["", "accuracy", f"minus {reference} ± s.e.", "validation loss", "trained"]
    return table([*header, *([beside[0]] if beside else [])], rows)
