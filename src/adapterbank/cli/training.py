"""The command that trains: train."""

from dataclasses import asdict
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from adapterbank.cli.app import Json, bars, fail, print_json, print_table, say


class Task(str, Enum):
    """What the model learns."""

    seq_cls = "seq-cls"
    causal_lm = "causal-lm"
    image_cls = "image-cls"


def train(
    bank: Annotated[str, typer.Option("--bank", metavar="BANK", help="Directory of the bank.")],
    model: Annotated[str, typer.Option(metavar="MODEL", help="Directory or hub id of the bank's base model.")],
    data: Annotated[Path, typer.Option(metavar="FILE", help="Examples, one JSON object a line.")],
    task: Annotated[Task, typer.Option(help="Classify texts, continue them, or classify images.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="Directory of the new adapter.")],
    evaluate: Annotated[
        Path | None, typer.Option("--eval", metavar="FILE", help="Examples to evaluate on after each epoch.")
    ] = None,
    eval_share: Annotated[float, typer.Option(metavar="S", help="Without --eval: this share of the data.")] = 0.1,
    k: Annotated[
        int | None,
        typer.Option("-k", metavar="K", help="Directions of the basis a side. By default 16, or all there are."),
    ] = None,
    r: Annotated[int, typer.Option("-r", metavar="R", help="Rank of the update.")] = 8,
    epochs: Annotated[int, typer.Option(metavar="N", help="Passes over the data.")] = 3,
    batch: Annotated[int, typer.Option(metavar="N", help="Examples a step.")] = 16,
    lr: Annotated[float | None, typer.Option(metavar="LR", help="Of the coefficients. By default 0.01.")] = None,
    head_lr: Annotated[float | None, typer.Option(metavar="LR", help="Of the head. By default 0.003.")] = None,
    gradient_directions: Annotated[
        int | None,
        typer.Option(metavar="N", help="Directions of the task's own gradient beside the bank's. By default 16."),
    ] = None,
    start: Annotated[
        str, typer.Option(help="Where coefficients start: mean of the members, base, random, member:NAME.")
    ] = "mean",
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Longer texts are cut.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the head, the coefficients and the order of the data.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint in OUT.")] = False,
    as_json: Json = False,
) -> None:
    """Train a new task in a bank: coefficients on its basis and on directions of the task's gradient, and a task head.

    A line of FILE is {"text": ..., "label": ...}, for causal-lm {"text": ...} or {"prompt": ..., "completion": ...}
    with loss on the completion only, for image-cls {"image": path relative to FILE, "label": ...}.

    Example: adapterbank train --bank bank --model org/base --data train.jsonl --task seq-cls -o task
    """
    missing = [name for name in ("peft", "transformers", "accelerate") if find_spec(name) is None]
    if missing:
        fail(f"training needs {' and '.join(missing)}: pip install 'adapterbank[peft]'")
    from adapterbank.tuner.training import TaskSettings, train_task

    rates = {name: rate for name, rate in (("lr", lr), ("head_lr", head_lr)) if rate is not None}
    settings = TaskSettings(
        task=task.value, r=r, k=k, start=start, epochs=epochs, batch=batch, gradient_directions=gradient_directions,
        max_tokens=max_tokens, eval_share=eval_share, seed=seed, **rates,
    )  # fmt: skip
    with bars() as tell:
        result = train_task(bank, model, data, out, settings, eval_data=evaluate, resume=resume, progress=tell)
    if as_json:
        print_json({**asdict(result), "out": str(result.out)})
        return
    print_table(
        f"Task {out}",
        ("", "trained values", "of the head", "bytes", "loss before", "after", "accuracy before", "after"),
        [
            (
                task.value,
                f"{result.trained:,}",
                f"{result.head:,}",
                f"{result.bytes:,}",
                f"{result.before.loss:.3f}",
                f"{result.after.loss:.3f}",
                f"{result.before.accuracy:.3f}",
                f"{result.after.accuracy:.3f}",
            )
        ],
    )
    say(f"Measured on {result.eval_examples} examples; {result.seconds:.0f} s.")
