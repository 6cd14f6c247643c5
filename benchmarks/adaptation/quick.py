"""One row of the main table again: does this machine get what is committed?"""

from collections.abc import Callable
from statistics import mean

from benchmarks.adaptation.analysis import Part
from benchmarks.adaptation.page import best_variant
from benchmarks.adaptation.runs import executed
from benchmarks.adaptation.sections import LORA
from benchmarks.adaptation.study import PARTS, SEEDS


def rerun(*, workers: int, told: Callable[[str], None]) -> bool:
    """Train the best variant on every held-out task with the first seed; agree within the row's spread over the seeds.

    Args:
        workers: Processes of one thread each.
        told: Called with each line of the report.
    """
    main = Part.read("main")
    if not main.has(LORA):
        raise SystemExit("Error: there are no results of the main table to compare with; run the part 'main' first")
    name = best_variant(main)
    runs = [run for run in PARTS["main"]() if run.method.name == name and run.seed == SEEDS[0]]
    committed, found = main.of(name, "accuracy"), {}
    for run, result in executed(runs, workers=workers, told=told):
        found[run.task] = result["accuracy"]
        told(f"{run.task}: {result['accuracy']:.3f}, committed {committed[run.task, run.seed]:.3f}")
    difference = mean(found.values()) - mean(committed[task, SEEDS[0]] for task in found)
    spread = main.spread(name) or 0.0
    agrees = abs(difference) <= spread
    told(f"{name}: {difference:+.4f} in the mean, {'within' if agrees else 'beyond'} the spread of {spread:.4f}")
    return agrees
