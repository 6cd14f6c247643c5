"""The commands that train: train, and shira train."""

from collections.abc import Callable
from dataclasses import asdict
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from adapterbank.cli.app import Json, Tell, bars, fail, print_json, print_table, say
from adapterbank.cli.shira import Mask, shira


class Task(str, Enum):
    """What the model learns."""

    seq_cls = "seq-cls"
    causal_lm = "causal-lm"
    image_cls = "image-cls"


Data = Annotated[Path, typer.Option(metavar="FILE", help="Examples, one JSON object a line.")]
WhichTask = Annotated[Task, typer.Option(help="Classify texts, continue them, or classify images.")]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="Directory of the new adapter.")]
Evaluate = Annotated[
    Path | None, typer.Option("--eval", metavar="FILE", help="Examples to evaluate on after each epoch.")
]
EvalShare = Annotated[float, typer.Option(metavar="S", help="Without --eval: this share of the data.")]
Epochs = Annotated[int, typer.Option(metavar="N", help="Passes over the data.")]
Batch = Annotated[int, typer.Option(metavar="N", help="Examples a step.")]
HeadRate = Annotated[float | None, typer.Option(metavar="LR", help="Of the head. By default 0.003.")]
MaxTokens = Annotated[int, typer.Option(metavar="N", help="Longer texts are cut.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint in OUT.")]


def train(
    bank: Annotated[str, typer.Option("--bank", metavar="BANK", help="Directory of the bank.")],
    model: Annotated[str, typer.Option(metavar="MODEL", help="Directory or hub id of the bank's base model.")],
    data: Data,
    task: WhichTask,
    out: Out,
    evaluate: Evaluate = None,
    eval_share: EvalShare = 0.1,
    k: Annotated[
        int | None,
        typer.Option("-k", metavar="K", help="Directions of the basis a side. By default 16, or all there are."),
    ] = None,
    r: Annotated[int, typer.Option("-r", metavar="R", help="Rank of the update.")] = 8,
    epochs: Epochs = 3,
    batch: Batch = 16,
    lr: Annotated[float | None, typer.Option(metavar="LR", help="Of the coefficients. By default 0.01.")] = None,
    head_lr: HeadRate = None,
    gradient_directions: Annotated[
        int | None,
        typer.Option(metavar="N", help="Directions of the task's own gradient beside the bank's. By default 16."),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            help="Where it starts: mean of the members, base, random, member:NAME. By default mean, with --core base."
        ),
    ] = None,
    core: Annotated[
        bool,
        typer.Option("--core", help="One matrix between 22 of the bank's directions: fewest bytes. LR is 0.03 then."),
    ] = False,
    max_tokens: MaxTokens = 256,
    seed: Annotated[int, typer.Option(help="Of the head, the coefficients and the order of the data.")] = 0,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Train a new task in a bank: coefficients on its basis and on directions of the task's gradient, and a task head.

    A line of FILE is {"text": ..., "label": ...}, for causal-lm {"text": ...} or {"prompt": ..., "completion": ...}
    with loss on the completion only, for image-cls {"image": path relative to FILE, "label": ...}.

    Example: adapterbank train --bank bank --model org/base --data train.jsonl --task seq-cls -o task
    """
    _check_installed()
    from adapterbank.training.in_bank import CoreSettings, TaskSettings, train_task

    settings = (CoreSettings if core else TaskSettings)(
        task=task.value, r=r, k=k, epochs=epochs, batch=batch, max_tokens=max_tokens, eval_share=eval_share, seed=seed,
        **_given(start=start, gradient_directions=gradient_directions, lr=lr, head_lr=head_lr),
    )  # fmt: skip

    def run(tell: Tell) -> Any:
        return train_task(bank, model, data, out, settings, eval_data=evaluate, resume=resume, progress=tell)

    _show(run, as_json)


@shira.command("train")
def train_sparse(
    model: Annotated[str, typer.Option(metavar="MODEL", help="Directory or hub id of the base model.")],
    data: Data,
    task: WhichTask,
    out: Out,
    evaluate: Evaluate = None,
    eval_share: EvalShare = 0.1,
    density: Annotated[float, typer.Option(metavar="D", help="Share of each layer's weights.")] = 0.01,
    mask: Annotated[Mask, typer.Option(help="Which weights: by magnitude, gradient, both, or neither.")] = Mask.wm,
    part: Annotated[int, typer.Option(metavar="N", help="Of wm, grad, snip: 1 takes the next largest, and so on.")] = 0,
    offset: Annotated[int, typer.Option(metavar="N", help="Of struct: the first row.")] = 0,
    epochs: Epochs = 3,
    batch: Batch = 16,
    lr: Annotated[float | None, typer.Option(metavar="LR", help="Of the values. By default 0.01.")] = None,
    head_lr: HeadRate = None,
    max_tokens: MaxTokens = 256,
    seed: Annotated[int, typer.Option(help="Of the head, a random mask and the order of the data.")] = 0,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Train a sparse adapter and a task head; grad and snip choose the weights by the task's first batches.

    FILE is as for adapterbank train. Adapters of different parts of wm share no weight, those of different offsets of
    struct only the diagonal.

    Example: adapterbank shira train --model org/base --data train.jsonl --task seq-cls -o law
    """
    _check_installed()
    from adapterbank.training.sparse import SparseSettings
    from adapterbank.training.sparse import train_sparse as train_it

    settings = SparseSettings(
        task=task.value, density=density, mask=mask.value, part=part, offset=offset, epochs=epochs, batch=batch,
        max_tokens=max_tokens, eval_share=eval_share, seed=seed, **_given(lr=lr, head_lr=head_lr),
    )  # fmt: skip

    def run(tell: Tell) -> Any:
        return train_it(model, data, out, settings, eval_data=evaluate, resume=resume, progress=tell)

    _show(run, as_json)


def _check_installed() -> None:
    missing = [name for name in ("peft", "transformers", "accelerate") if find_spec(name) is None]
    if missing:
        fail(f"training needs {' and '.join(missing)}: pip install 'adapterbank[peft]'")


def _given(**options: Any) -> dict[str, Any]:
    """Those that were given: the others have defaults of their own."""
    return {name: value for name, value in options.items() if value is not None}


def _show(run: Callable[[Tell], Any], as_json: bool) -> None:
    with bars() as tell:
        result = run(tell)
    if as_json:
        print_json({**asdict(result), "out": str(result.out)})
        return
    print_table(
        f"Task {result.out}",
        ("", "trained values", "of the head", "bytes", "loss before", "after", "accuracy before", "after"),
        [
            (
                result.task,
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
