"""One training run, the same for every method: what is adapted, and at which rate, is all that differs."""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from adapterbank.tuner import StagedComponents
from benchmarks.adaptation.subject import Batch, Sample, Subject

EVAL_BATCH = 80
WINDOW = 5
"""Batches that are drawn and sorted by length together."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How all methods are trained."""

    steps: int
    batch: int = 16
    warmup: float = 0.1
    """Share of the steps; afterwards the rate goes down linearly."""
    evaluate: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
    """After which shares of the steps the validation loss is taken."""
    seed: int = 0
    """Of order and dropout."""
    components: float = 0.0
    """Share of the steps, at the end, in which the bank's components are trained too."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run gave."""

    train_loss: list[float]
    """Of every step."""
    validation: list[tuple[int, float, float]]
    """Step, loss, accuracy."""
    step_seconds: float
    """Median CPU seconds of forward, backward and update."""


def train(
    subject: Subject,
    model: nn.Module,
    groups: list[dict[str, Any]],
    examples: Sequence[Sample],
    validation: Sequence[Sample],
    recipe: Recipe,
) -> Trained:
    """AdamW without decay, gradients clipped to 1, a linear warm-up and then down."""
    torch.manual_seed(recipe.seed)
    if not recipe.steps:
        return Trained(train_loss=[], validation=[(0, *_validated(subject, model, validation))], step_seconds=0.0)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    warmup, steps = max(1, round(recipe.warmup * recipe.steps)), recipe.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    staged = StagedComponents(recipe.components) if recipe.components else None
    stops = {max(1, round(share * steps)) for share in recipe.evaluate}
    losses, curve, seconds = [], [(0, *_validated(subject, model, validation))], []
    for step, batch in enumerate(ordered(subject, examples, recipe), 1):
        model.train()
        if staged is not None:
            where = SimpleNamespace(global_step=step - 1, max_steps=steps)
            how: dict[str, Any] = {"model": model, "optimizer": optimizer, "lr_scheduler": schedule}
            staged.on_step_begin(SimpleNamespace(world_size=1), where, None, **how)
        start = time.process_time()
        loss = model(**batch).loss
        loss.backward()
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - start)
        schedule.step()
        losses.append(float(loss.detach()))
        if step in stops:
            curve.append((step, *_validated(subject, model, validation)))
    return Trained(train_loss=losses, validation=curve, step_seconds=median(seconds))


def _validated(subject: Subject, model: nn.Module, validation: Sequence[Sample]) -> tuple[float, float]:
    loss, right = evaluate(subject, model, validation)
    return loss, float(right.double().mean())


def ordered(subject: Subject, examples: Sequence[Sample], recipe: Recipe) -> list[Batch]:
    """``recipe.steps`` batches in random order; texts of like length go together, which saves half of the padding."""
    order, batches = random.Random(recipe.seed), list[Sequence[Sample]]()
    while len(batches) < recipe.steps:
        window = order.sample(list(examples), min(len(examples), WINDOW * recipe.batch))
        window.sort(key=lambda example: len(str(example[0])))
        drawn = [window[i : i + recipe.batch] for i in range(0, len(window), recipe.batch)]
        batches += order.sample(drawn, len(drawn))
    return [subject.batch(batch) for batch in batches[: recipe.steps]]


@torch.no_grad()
def evaluate(subject: Subject, model: nn.Module, examples: Sequence[Sample]) -> tuple[float, Tensor]:
    """Mean loss, and which examples are right, in their order."""
    model.eval()
    # by length: little padding
    order = sorted(range(len(examples)), key=lambda i: len(str(examples[i][0])))
    right, loss = torch.zeros(len(examples), dtype=torch.bool), 0.0
    for start in range(0, len(order), EVAL_BATCH):
        chosen = order[start : start + EVAL_BATCH]
        batch = subject.batch([examples[i] for i in chosen])
        output = model(**batch)
        right[chosen] = subject.right(output.logits, batch)
        loss += float(output.loss) * len(chosen)
    return loss / len(examples), right
