"""``docs/benchmarks/adaptation.md`` from the committed results."""

from collections.abc import Mapping
from statistics import median

from benchmarks.adaptation.analysis import Part, gap, reached
from benchmarks.adaptation.glossary import glossary
from benchmarks.adaptation.sections import LORA, TASKS, further_sections
from benchmarks.adaptation.summary import summary
from benchmarks.adaptation.words import kilobytes, percent, rates, signed, told
from benchmarks.markdown import table

BRIEF = (
    "gradient", "core 22 x 22", LORA, "LoRA from the bank", "LoRA r=1", "UniLora", "bank", "paper, mean left out",
    "random", "head",
)  # fmt: skip
OURS = (
    "bank", "bank, mean start", "bank + gradient", "bank + gradient, mean start", "gradient", "core 22 x 22",
)  # fmt: skip


def page() -> list[str]:
    """Paragraphs and tables."""
    parts = [
        "# Does recycling help a new task?",
        "LoRAs of one model are recycled into a bank; a task that the bank has not seen is then learned from a few "
        "hundred examples.",
    ]
    main = Part.read("main")
    if main.has(LORA):
        parts += [*summary(), *glossary(), *_main(main), *_per_task(main), *_convergence(main)]
        parts += [*_in_fewer_steps(main), *further_sections(main)]
    return parts


def brief() -> list[str]:
    """What the README says of it."""
    main = Part.read("main")
    if not main.has(LORA):
        return []
    best = best_variant(main)
    rows = [
        [
            f"**{name}**" if name == best else name, f"{main.mean(name, 'trained'):,.0f}", f"{main.mean(name):.3f}",
            "" if name == LORA else signed(main.difference(name, LORA)), f"{main.final_loss(name):.3f}",
            kilobytes(main.mean(name, "stored_bytes")),
        ]
        for name in dict.fromkeys((best, *BRIEF))
    ]  # fmt: skip
    return [
        f"A new task from 320 examples, {len(main.tasks)} text tasks outside the bank, 3 seeds, each method at its "
        "own learning rates ([the study](docs/benchmarks/adaptation.md)). *Gradient* is a basis of the task's own "
        "gradient, without any bank, and is stored with the task; a *core* is one small matrix between the bank's "
        "directions:",
        table(["", "trained values", "accuracy", "minus LoRA r=8 ± s.e.", "validation loss", "stored"], rows),
    ]


def best_variant(main: Part) -> str:
    """Of ours, the one with the lowest final validation loss over all tasks and seeds: the measure of the rates too."""
    return min((name for name in OURS if name in main.cells), key=main.final_loss)


def _main(main: Part) -> list[str]:
    rows = []
    for name in sorted(main.cells, key=lambda name: -main.mean(name)):
        spread = main.spread(name)
        rows.append(
            [
                f"**{name}**" if name == best_variant(main) else name,
                f"{main.mean(name):.3f}" + (f" ± {spread:.3f}" if spread is not None else ""),
                "" if name == LORA else signed(main.difference(name, LORA)),
                f"{main.final_loss(name):.3f}",
                f"{main.mean(name, 'test_loss'):.3f}",
                f"{main.mean(name, 'trained'):,.0f}",
                f"{_fitted(main, name):,.0f}",
                kilobytes(main.mean(name, "stored_bytes")),
                str(round(_steps_before(main, name))),
                rates(*main.rates[name]),
            ]
        )
    header = [
        "", "accuracy ± over seeds", "minus LoRA r=8 ± s.e.", "validation loss", "test loss", "trained", "fixed",
        "stored", "before, in steps", "rate, head's",
    ]  # fmt: skip
    cells = len(main.cells[LORA])
    seeds = ", ".join(map(str, sorted({seed for _, seed in main.cells[LORA]})))
    return [
        "## Held-out tasks",
        f"MiniLM-L6, query and value, {cells} cells: {', '.join(main.tasks)}, seeds {seeds}; 320 examples, 80 steps of "
        f"16, {_tested(main)} test texts. The head is a linear layer on the mean of the tokens; all methods train it, "
        "and it is left out of counts and bytes. In bold the best of ours by validation loss. After the second ± "
        "stands the standard error of the paired difference over the cells, and in brackets over the tasks alone. "
        "*Fixed* counts the values of directions that were fitted to the task before training, which stay as they are "
        "and are stored at 4 bits; all other values at 32. *Before* is what choosing directions costs before training "
        "beyond LoRA's own start, in its steps' CPU time. Time of a step and memory are measured "
        "[elsewhere](training.md), in turns.",
        table(header, rows),
        "![Accuracy by method](../pictures/adaptation-accuracy.svg)",
        verdict(main),
    ]


def verdict(main: Part) -> str:
    """The study's first question, answered."""
    best = best_variant(main)
    difference = main.difference(best, LORA)
    share = main.mean(best, "trained") / main.mean(LORA, "trained")
    target = main.mean_curve(LORA)[-1][1]
    ours, theirs = (reached(main.mean_curve(name), target) for name in (best, LORA))
    held = "not below" if difference.mean >= -difference.error else "below"
    return (
        f"**{best}** trains {100 * share:.1f} % of LoRA r=8's values. Its mean accuracy is {held} LoRA's by more than "
        f"one standard error ({signed(difference)}). LoRA's final validation loss, {target:.3f} in the mean, is "
        f"reached after {percent(ours)} of the steps; LoRA itself passes through it after {percent(theirs)}."
    )


def _in_fewer_steps(main: Part) -> list[str]:
    short = Part.read("short")
    if not short.has(LORA):
        return []
    rows = []
    for name in short.cells:
        gaps = [
            gap(short.final_losses(name), main.final_losses(LORA)),
            *(gap(short.of(name, field), main.of(LORA, field)) for field in ("test_loss", "accuracy")),
        ]
        cost = median(
            _cost(result, short.steps) / _cost(main.cells[LORA][cell], main.steps)
            for cell, result in short.cells[name].items()
        )
        rows.append([name, f"{short.final_loss(name):.3f}", *map(signed, gaps), f"{100 * cost:.0f} %"])
    header = [
        "", "validation loss", "minus LoRA's ± s.e.", "test loss minus LoRA's", "accuracy minus LoRA's", "CPU time",
    ]  # fmt: skip
    return [
        f"## In {100 * short.steps / main.steps:.0f} % of the steps",
        "Every schedule ends at a rate of zero, and much of the loss goes down only there. So these were trained again "
        f"with a schedule of {short.steps} steps instead of {main.steps}, their rates chosen for it as above; they are "
        f"compared with LoRA r=8 after all {main.steps} steps. CPU time is that of all steps and of choosing "
        "directions, as a share of that LoRA's.",
        table(header, rows),
    ]


def _cost(result: Mapping[str, float], steps: int) -> float:
    return result["build_seconds"] + steps * result["step_seconds"]


def _per_task(main: Part) -> list[str]:
    rows = [
        [name, *(f"{main.mean(name, task=task):.3f}" for task in main.tasks)]
        for name in sorted(main.cells, key=lambda name: -main.mean(name))
        if {task for task, _ in main.cells[name]} == set(main.tasks)
    ]
    return ["Accuracy by task:", table(["", *(TASKS[task] for task in main.tasks)], rows)]


def _convergence(main: Part) -> list[str]:
    finals = {task: main.curve(LORA, task)[-1][1] for task in main.tasks}
    lowest = {task: min(loss for _, loss in main.curve(LORA, task)) for task in main.tasks}
    rows = []
    for name in main.cells:
        if {task for task, _ in main.cells[name]} != set(main.tasks):
            continue
        to_final = [reached(main.curve(name, task), finals[task]) for task in main.tasks]
        to_lowest = [reached(main.curve(name, task), lowest[task]) for task in main.tasks]
        rows.append([name, *map(percent, to_final), told(to_final), told(to_lowest)])
    header = ["steps to LoRA's final loss", *(TASKS[task] for task in main.tasks), "median", "median, to its lowest"]
    return [
        "## Convergence",
        "Share of the steps after which the validation loss, mean over the seeds, is first as low as LoRA r=8's at the "
        "end of its training. LoRA's own row shows how much of that is overfitting: where it stands below 100 %, LoRA "
        "had been as low before. The last column asks for the lowest loss of LoRA's whole run instead.",
        "![Validation loss by step](../pictures/adaptation-convergence.svg)",
        table(header, rows),
    ]


def _fitted(main: Part, name: str) -> float:
    """Values of the directions of the task's gradient: a direction a side has as many as a LoRA of rank 1."""
    (count,) = {line["method"]["gradient"].get("count", 0) for line in main.lines if line["method"]["name"] == name}
    return count * main.mean("LoRA r=1", "trained") if count else 0


def _tested(main: Part) -> str:
    counts = sorted({line["result"]["test_examples"] for line in main.lines})
    return " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))


def _steps_before(part: Part, name: str) -> float:
    """CPU time of building the model beyond what LoRA takes, in LoRA's steps, the median over cells."""
    ours, theirs, step = part.of(name, "build_seconds"), part.of(LORA, "build_seconds"), part.of(LORA, "step_seconds")
    return median((ours[cell] - theirs[cell]) / step[cell] for cell in ours.keys() & theirs.keys())
