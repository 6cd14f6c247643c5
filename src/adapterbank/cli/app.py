"""The application: how every command ends, shows progress, and prints."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from adapterbank.errors import AdapterBankError

Tell = Callable[[str, int, int], None]
"""``tell(stage, done, total)``, as in ``Bank.fit``."""


class Group(TyperGroup):
    """Turns what a user can cause into one line and an exit code; anything else is a bug and keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except AdapterBankError as error:
            fail(str(error))
        except BrokenPipeError:  # typer's own: `adapterbank info bank | head` is no error of ours
            raise
        except OSError as error:
            fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        except KeyboardInterrupt:
            typer.echo("Interrupted.", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=Group,
    name="adapterbank",
    no_args_is_help=True,
    add_completion=False,
    # plain help: the same text in a terminal, in a pipe and in docs/cli.md
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 100},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
BaseId = Annotated[
    str | None,
    typer.Option("--base", metavar="ID", help="Id of the base model; what the adapters say is not compared."),
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out adapters that can't be used, and list them.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Also read adapter_model.bin, if you trust it.")]
Adapters = Annotated[
    list[str],
    typer.Argument(metavar="ADAPTER", help="PEFT directories, files or hub ids; NAME=PATH gives another name."),
]
BankPath = Annotated[str, typer.Argument(metavar="BANK", help="Directory of the bank.")]


def _version(wanted: bool) -> bool:
    if wanted:
        from adapterbank import __version__

        typer.echo(f"adapterbank {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Recycle LoRA adapters: many adapters of one base model in one small bank, plain PEFT in and out.

    Example: adapterbank fit adapters/*/ -o bank --ratio 16
    """


def main() -> None:
    """Run the command line."""
    app()


# --- how it ends ----------------------------------------------------------------------------------------------------


def fail(message: str) -> None:
    """Print the one ``Error:`` line and end with exit code 1.

    Raises:
        typer.Exit: Always.
    """
    typer.echo(f"Error: {clean(message)}", err=True)
    raise typer.Exit(1)


def clean(text: object) -> str:
    """One printable line: names in strangers' files may hold line breaks, terminal codes or half a character."""
    joined = " ".join(str(text).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in joined)


# --- progress -------------------------------------------------------------------------------------------------------


@contextmanager
def bars() -> Iterator[Tell]:
    """A bar for each stage, on standard error; silent where that is no terminal."""
    if not sys.stderr.isatty():
        yield lambda stage, done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        known: dict[str, TaskID] = {}

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in known:
                known[stage] = shown.add_task(stage, total=total)
            shown.update(known[stage], completed=done, total=total)

        yield tell


# --- printing -------------------------------------------------------------------------------------------------------


def print_json(data: dict[str, Any]) -> None:
    """Print the one JSON object."""
    typer.echo(json.dumps(data, allow_nan=False))


def say(*lines: str) -> None:
    """Print lines."""
    for line in lines:
        typer.echo(clean(line))


def count(number: int, word: str) -> str:
    """``1 adapter``, ``2 adapters``."""
    return f"{number} {word}{'s' * (number != 1)}"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, last: int = 0) -> None:
    """Print a table: the first column is text, the others are numbers.

    Args:
        title: Stands above it.
        columns: Their names.
        rows: Their cells, as they are to be shown.
        last: So many rows at the end are totals.
    """
    # a pipe has no width, and cut names are useless to whatever reads it
    console = Console(width=None if sys.stdout.isatty() else 400, highlight=False)
    table = Table()
    for number, column in enumerate(columns):
        table.add_column(Text(column), justify="right" if number else "left", overflow="fold")
    for position, row in enumerate(rows):
        # Text: brackets in a name are not markup
        table.add_row(*(Text(clean(cell)) for cell in row), end_section=position == len(rows) - last - 1 and last > 0)
    say(title)  # not the table's own title, which is broken to the table's width
    console.print(table)
