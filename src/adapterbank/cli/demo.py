"""The command that shows it all."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from adapterbank.cli.app import Json, bars, fail


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where everything goes.")] = Path("demo-out"),
    adapters: Annotated[int, typer.Option(metavar="N", help="How many adapters are trained.")] = 6,
    ratio: Annotated[float, typer.Option(metavar="R", help="Of the bank.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the training.")] = 0,
    as_json: Json = False,
) -> None:
    """Train a few real adapters, put them into a bank, restore them, train one more task in it, and compare.

    Takes minutes the first time; models, data and trained adapters are then cached.

    Example: adapterbank demo --adapters 6 --ratio 16
    """
    missing = [name for name in ("peft", "transformers", "matplotlib") if find_spec(name) is None]
    if missing:
        fail(f"the demo needs {' and '.join(missing)}: pip install 'adapterbank[demo]'")
    from adapterbank.demo.run import print_result, run_demo

    with bars() as tell:
        result = run_demo(out, adapters=adapters, ratio=ratio, seed=seed, progress=tell)
    if as_json:
        typer.echo(result.to_json())
    else:
        print_result(result, Console(width=None if sys.stdout.isatty() else 160))
