"""The command before serving: plan."""

from dataclasses import asdict
from enum import Enum
from typing import Annotated, Any

import typer

from adapterbank.cli.app import BankPath, Json, count, print_json, print_table, say
from adapterbank.cli.shira import base_model


class Bits(str, Enum):
    """Of a value in memory."""

    eight = "8"
    sixteen = "16"
    thirty_two = "32"


def plan(
    bank: BankPath,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Directory or hub id of the base model, to count it too.")
    ] = None,
    k: Annotated[
        int | None, typer.Option("-k", metavar="K", help="Directions a side; by default as the engine takes them.")
    ] = None,
    members: Annotated[
        int | None, typer.Option(metavar="N", help="For so many members like the bank's; by default those it has.")
    ] = None,
    bits: Annotated[Bits, typer.Option(help="Of a member's value in memory.")] = Bits.sixteen,
    as_json: Json = False,
) -> None:
    """Say how many bytes a bank takes on the device that serves it, against full adapters at 16 bits.

    Example: adapterbank plan bank --model org/base
    """
    from adapterbank.bank import Bank
    from adapterbank.runtime.plan import plan as planned

    opened, base, dtype = Bank.load(bank), None, None
    if model is not None:
        base, dtype = _base(model)
    found = planned(opened, members=members, k=k, bits=int(bits.value), **({} if dtype is None else {"dtype": dtype}))
    if as_json:
        print_json({"bank": bank, "base_bytes": base, **asdict(found), "bytes": found.bytes})
        return
    rows = [
        *([("base model", _size(base))] if base is not None else []),
        ("shared directions", _size(found.basis_bytes)),
        ("coefficients", _size(found.shared_bytes)),
        ("what the directions can't hold", _size(found.private_bytes)),
        ("task heads", _size(found.head_bytes)),
        ("the bank", _size(found.bytes)),
        ("as full adapters", _size(found.full_bytes + found.head_bytes)),
    ]
    print_table(f"{count(found.members, 'member')} of {bank}", ("", "bytes"), rows, last=2)
    if found.sampled < found.members:
        say(f"From {count(found.sampled, 'member')} that were read.")
    if found.private_bytes > found.shared_bytes:
        say("Most of it is what members don't share: a bank of them fitted with -k alone has none, and larger errors.")


def _base(model: str) -> tuple[int, Any]:
    """Bytes of a model, in the type that it was saved in, and that type."""
    import torch

    loaded = base_model(model)
    dtype = getattr(loaded.config, "dtype", None) or torch.float32
    return sum(parameter.numel() for parameter in loaded.parameters()) * dtype.itemsize, dtype


def _size(count: int | None) -> str:
    amount, unit = float(count or 0), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 1000:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.3g} {unit}"
