"""The study's questions in one table: what was compared, and whether the runs tell it apart."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.adaptation.analysis import Paired, Part
from benchmarks.adaptation.sections import LORA, TASKS
from benchmarks.adaptation.words import signed
from benchmarks.markdown import table

CERTAIN = 2.0
"""Standard errors, the larger of both kinds, from which a difference counts."""

FEWEST = 3
"""Cells that a standard error needs to mean anything."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """Two methods on the same cells."""

    asked: str
    parts: tuple[str, ...]
    ours: str
    theirs: str
    among: Callable[[Part], Part] = lambda part: part
    """Which of the parts' lines."""


def _outside(part: Part) -> Part:
    return part.on(TASKS)


def _of_a_kind(part: Part) -> Part:
    return part.on(OF_A_KIND)


def _of_no_kind(part: Part) -> Part:
    return part.on(TASKS.keys() - OF_A_KIND)


def _related(part: Part) -> Part:
    return part.on(set(part.tasks) - set(TASKS))


RECIPE = "bank + gradient, mean start"
"""The documented default."""
OF_A_KIND = {"reuters-r8", "rotten-tomatoes"}
"""Topics of news and sentiment of reviews, as in some sources."""
ABLATED = ("main", "ablation")
QUESTIONS = (
    Question(asked="320 examples, tasks outside the bank", parts=("main",), ours=RECIPE, theirs=LORA),
    Question(asked="two of them, of a kind with sources", parts=("main",), ours=RECIPE, theirs=LORA, among=_of_a_kind),
    Question(asked="the other four", parts=("main",), ours=RECIPE, theirs=LORA, among=_of_no_kind),
    Question(asked="48 examples, tasks outside", parts=("few-data",), ours=RECIPE, theirs=LORA, among=_outside),
    Question(asked="the same", parts=("few-data",), ours=RECIPE, theirs="head", among=_outside),
    Question(asked="48 examples, related tasks", parts=("few-data",), ours=RECIPE, theirs=LORA, among=_related),
    Question(asked="the same", parts=("few-data",), ours=RECIPE, theirs="head", among=_related),
    Question(asked="2,000 examples, tasks outside", parts=("more-data",), ours=RECIPE, theirs=LORA),
    Question(asked="the gradient's directions, without a bank", parts=("main",), ours="gradient", theirs=LORA),
    Question(asked="the same", parts=("main",), ours="gradient", theirs="random"),
    Question(asked="the bank's directions", parts=("main",), ours="bank", theirs="random"),
    Question(asked="the same, related tasks", parts=ABLATED, ours="bank", theirs="random", among=_related),
    Question(asked="the published basis", parts=("main",), ours="paper, mean left out", theirs="random"),
    Question(asked="the members' mean as the start", parts=("main",), ours=RECIPE, theirs="bank + gradient"),
    Question(asked="the same, for a LoRA", parts=("main",), ours="LoRA from the bank", theirs=LORA),
    Question(asked="a twelfth of a LoRA's bytes", parts=("main",), ours="core 22 x 22", theirs=LORA),
    Question(asked="the same, against random projections", parts=("main",), ours="core 22 x 22", theirs="UniLora"),
    Question(asked="a vision model, 192 values", parts=("vision",), ours="bank, k=2", theirs="LoRA r=4"),
    Question(asked="the same", parts=("vision",), ours="bank, k=2", theirs="head"),
    Question(asked="the bank's directions there", parts=("vision",), ours="bank, k=16", theirs="random"),
    Question(asked="a language model", parts=("language",), ours=RECIPE, theirs=LORA),
    Question(asked="the same", parts=("language",), ours=RECIPE, theirs="gradient"),
    Question(asked="the bank's directions there", parts=("language",), ours="bank, mean start", theirs="random"),
    Question(asked="the same", parts=("language",), ours="bank, mean start", theirs=LORA),
)


def summary() -> list[str]:
    """A table of those questions that have an answer."""
    rows = []
    for question in QUESTIONS:
        part = question.among(Part.read(*question.parts))
        if not part.has(question.ours, question.theirs):
            continue
        gap = part.difference(question.ours, question.theirs)
        loss = part.loss_difference(question.ours, question.theirs)
        compared = f"{question.ours} − {question.theirs}"
        rows.append([question.asked, compared, str(gap.cells), signed(gap), signed(loss), said(gap, loss)])
    header = ["", "compared", "cells", "accuracy ± s.e.", "validation loss ± s.e.", ""]
    return [
        "## In short",
        "Differences on the same tasks and seeds; after ± the standard error over the cells, in brackets over the "
        "tasks alone. The last column names what differs by at least two standard errors, the larger of both; among so "
        "many questions, one such answer is to be expected by chance.",
        table(header, rows),
    ]


def said(accuracy: Paired, loss: Paired) -> str:
    """Which of both measures says more than noise."""
    found = [
        _judged(accuracy.mean, accuracy, "accuracy"),
        _judged(-loss.mean, loss, "loss"),
    ]
    return ", ".join(filter(None, found)) or "not told apart"


def _judged(gain: float, gap: Paired, measure: str) -> str:
    if gap.cells < FEWEST or abs(gain) < CERTAIN * max(gap.error, gap.error_over_tasks):
        return ""
    return f"better {measure}" if gain > 0 else f"worse {measure}"
