"""Commands that change members, or write them out: remove, rename, export."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from adapterbank.cli.app import BankPath, Json, bars, count, fail, print_json, say
from adapterbank.cli.members import error_text


class Dtype(str, Enum):
    """What A and B are written as."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def remove(
    bank: BankPath,
    names: Annotated[list[str], typer.Argument(metavar="NAME", help="Members.")],
    as_json: Json = False,
) -> None:
    """Remove members from a bank; its basis stays as it is.

    Tasks trained on directions that come from them are coded again first, as exactly as can be.

    Example: adapterbank remove bank old-task older-task
    """
    from adapterbank.bank import Bank

    with Bank.edit(bank) as changed:
        again = [task for name in names for task in changed.remove(name)]
        again = [task for task in again if task in changed]
    if as_json:
        print_json({"removed": names, "coded_again": again, "adapters": len(changed), "bytes": changed.bytes})
        return
    if again:
        say(f"Coded {', '.join(again)} again: trained on directions that came from what was removed.")
    say(f"Removed {', '.join(names)}; {count(len(changed), 'adapter')} left in {changed.bytes:,} bytes.")


def rename(
    bank: BankPath,
    old: Annotated[str, typer.Argument(metavar="OLD", help="The member's name.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="Its new name.")],
    as_json: Json = False,
) -> None:
    """Give a member another name.

    Example: adapterbank rename bank checkpoint-400 legal
    """
    from adapterbank.bank import Bank

    with Bank.edit(bank) as changed:
        changed.rename(old, new)
    if as_json:
        print_json({"renamed": {"old": old, "new": new}})
        return
    say(f"Renamed {old} to {new}.")


def export(
    bank: BankPath,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where the adapters go.")],
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Members.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every member.")] = False,
    dtype: Annotated[Dtype, typer.Option(help="Of A and B; task heads keep their own.")] = Dtype.float32,
    force: Annotated[bool, typer.Option("--force", help="Replace adapters that are there.")] = False,
    as_json: Json = False,
) -> None:
    """Write members as ordinary PEFT adapters.

    One name: DIR becomes the adapter. Several, or --all: each goes to DIR/NAME.

    Example: adapterbank export bank legal -o restored/legal

    Example: adapterbank export bank --all -o restored --dtype bfloat16
    """
    if bool(names) == everything:
        raise typer.BadParameter("give the names of members, or --all", param_hint="NAME")
    import torch

    from adapterbank.bank import Bank

    opened = Bank.load(bank)
    wanted = list(dict.fromkeys(names or opened.names))
    for name in wanted:  # before any of them is written
        _ = opened[name]
    alone = len(wanted) == 1 and not everything
    written = {name: out if alone else out / name for name in wanted}
    there = [path for path in written.values() if (path / "adapter_config.json").exists()]
    if there and not force:
        fail(f"{there[0]} holds an adapter already; give another directory, or replace it with --force")
    with bars() as tell:
        for done, name in enumerate(wanted, start=1):
            opened.export(name, written[name], dtype=getattr(torch, dtype.value))
            tell("writing adapters", done, len(wanted))
    if as_json:
        print_json({"exported": {name: str(path) for name, path in written.items()}, "dtype": dtype.value})
        return
    say(*(f"{name} is in {path}, error {error_text(opened[name])}." for name, path in written.items()))
