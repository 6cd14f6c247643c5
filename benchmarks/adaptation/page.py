"""``docs/benchmarks/adaptation.md`` from the committed results."""

from statistics import median

from benchmarks.adaptation.analysis import Part, reached
from benchmarks.adaptation.sections import LORA, TASKS, further_sections
from benchmarks.adaptation.summary import summary
from benchmarks.adaptation.words import kilobytes, percent, rates, signed, told
from benchmarks.markdown import table

BRIEF = (LORA, "LoRA from the bank", "LoRA r=1", "bank", "random", "head")
OURS = (
    "bank", "bank, mean start", "bank + gradient", "bank + gradient, mean start", "gradient", "core 22 x 22",
    "core 22 x 22, mean start",
)  # fmt: skip


def page() -> list[str]:
    """Paragraphs and tables."""
    parts = [
        "# Does recycling help a new task?",
        "LoRAs of one model are recycled into a bank; a task that the bank has not seen is then learned from a few "
        "hundred examples. Every method has two learning rates, its own and its head's, chosen on the validation parts "
        "of two tasks with one seed: from three rates a factor of 3 apart, then from all neighbours of the best pair "
        "until it has none untried. Nothing was chosen on a test part.",
    ]
    main = Part.read("main")
    if main.has(LORA):
        parts += [*summary(), *_main(main), *_per_task(main), *_convergence(main), *further_sections(main)]
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
        ]
        for name in dict.fromkeys((best, *BRIEF))
    ]  # fmt: skip
    return [
        f"A new task from 320 examples, {len(main.tasks)} text tasks unlike the bank's, 3 seeds, each method at its "
        "own learning rates ([the study](docs/benchmarks/adaptation.md)):",
        table(["", "trained values", "accuracy", "minus LoRA r=8 ± s.e.", "validation loss"], rows),
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
                kilobytes(main.mean(name, "stored_bytes")),
                f"{_step_share(main, name):.2f}",
                f"{_steps_before(main, name):.0f}",
                rates(*main.rates[name]),
            ]
        )
    header = [
        "", "accuracy ± over seeds", "minus LoRA r=8 ± s.e.", "validation loss", "test loss", "trained", "stored",
        "step, of LoRA's", "before, in steps", "rate, head's",
    ]  # fmt: skip
    cells = len(main.cells[LORA])
    seeds = ", ".join(map(str, sorted({seed for _, seed in main.cells[LORA]})))
    return [
        "## Held-out tasks",
        f"MiniLM-L6, query and value, {cells} cells: {', '.join(main.tasks)}, seeds {seeds}; 320 examples, 80 steps of "
        "16, 400 test texts. The head is a linear layer on the mean of the tokens; all methods train it, and it is "
        "left out of counts and bytes. In bold the best of ours by validation loss. After the second ± stands the "
        "standard error of the paired difference over the cells, and in brackets over the tasks alone. *Before* is "
        "what choosing directions costs before training beyond LoRA's own start, in its steps' CPU time. Memory in "
        "training is measured [elsewhere](training.md).",
        table(header, rows),
        "![Accuracy by method](../pictures/adaptation-accuracy.svg)",
        verdict(main),
    ]


def verdict(main: Part) -> str:
    """The study's first question, answered."""
    best = best_variant(main)
    gap = main.difference(best, LORA)
    share = main.mean(best, "trained") / main.mean(LORA, "trained")
    target = main.mean_curve(LORA)[-1][1]
    ours, theirs = (reached(main.mean_curve(name), target) for name in (best, LORA))
    held = "not below" if gap.mean >= -gap.error else "below"
    return (
        f"**{best}** trains {100 * share:.1f} % of LoRA r=8's values. Its mean accuracy is {held} LoRA's by more than "
        f"one standard error ({signed(gap)}). LoRA's final validation loss, {target:.3f} in the mean, is reached after "
        f"{percent(ours)} of the steps; LoRA itself passes through it after {percent(theirs)}."
        + _in_fewer_steps(best, main)
    )


def _in_fewer_steps(best: str, main: Part) -> str:
    short = Part.read("short")
    if not short.has(best, LORA):
        return ""
    share = short.steps / main.steps
    return (
        " Every schedule ends at a rate of zero, and much of the loss goes down only there; so both were trained again "
        f"with a schedule of {100 * share:.0f} % of the steps, its rates chosen for it as above. **{best}** then "
        f"ends at {short.final_loss(best):.3f} (accuracy {short.mean(best):.3f}), LoRA at {short.final_loss(LORA):.3f} "
        f"({short.mean(LORA):.3f}), against LoRA's {main.final_loss(LORA):.3f} ({main.mean(LORA):.3f}) after all."
    )


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


def _steps_before(part: Part, name: str) -> float:
    """CPU time of building the model beyond what LoRA takes, in LoRA's steps, the median over cells."""
    ours, theirs, step = part.of(name, "build_seconds"), part.of(LORA, "build_seconds"), part.of(LORA, "step_seconds")
    return median((ours[cell] - theirs[cell]) / step[cell] for cell in ours.keys() & theirs.keys())


def _step_share(part: Part, name: str) -> float:
    """CPU time of a step over LoRA's on the same task and seed, the median over cells."""
    ours, theirs = part.of(name, "step_seconds"), part.of(LORA, "step_seconds")
    return median(ours[cell] / theirs[cell] for cell in ours.keys() & theirs.keys())
