"""Commands that code adapters: fit, add, absorb."""

import os
from contextlib import suppress
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapterbank.cli.app import (
    Adapters,
    AllowPickle,
    BankPath,
    BaseId,
    Json,
    SkipBad,
    bars,
    count,
    fail,
    print_json,
    say,
)
from adapterbank.cli.members import describe, member, print_members

if TYPE_CHECKING:
    from adapterbank.bank import Bank


class Method(str, Enum):
    """What the basis is fitted to."""

    product = "product"
    eigenlora = "eigenlora"
    flat = "flat"


class Mean(str, Enum):
    """What becomes of the mean in the papers' methods."""

    affine = "affine"
    drop = "drop"
    none = "none"


def fit(
    adapters: Adapters,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="BANK", help="Directory of the new bank.")],
    ratio: Annotated[
        float | None, typer.Option(metavar="R", help="Bytes of all A and B in 32 bits, over bytes of the bank.")
    ] = None,
    budget: Annotated[str | None, typer.Option(metavar="SIZE", help="Bytes of the bank: 20MB, 1.5GiB, 300000.")] = None,
    max_error: Annotated[
        float | None,
        typer.Option(metavar="E", help="Largest relative error of any adapter's update. By default 0.05."),
    ] = None,
    k: Annotated[
        int | None, typer.Option("-k", metavar="K", help="Exactly so many shared directions a side. Alone: no promise.")
    ] = None,
    method: Annotated[
        Method, typer.Option(help="Fit the updates, or stacked or flattened A and B as in the papers.")
    ] = Method.product,
    mean: Annotated[Mean, typer.Option(help="Of the papers' methods: keep, forget or don't subtract the mean.")] = (
        Mean.affine
    ),
    balance: Annotated[bool, typer.Option("--balance", help="Of the papers' methods: balance A and B first.")] = False,
    no_quantize: Annotated[bool, typer.Option("--no-quantize", help="Store 32-bit floats.")] = False,
    base: BaseId = None,
    skip_bad: SkipBad = False,
    allow_pickle: AllowPickle = False,
    seed: Annotated[int, typer.Option(help="Of the randomised search for directions.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace the bank that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Fit a bank on adapters of one base model.

    Give one target: --ratio, --budget or --max-error. Nothing is written unless the fit succeeds.

    Example: adapterbank fit adapters/*/ -o bank --ratio 16

    Example: adapterbank fit law=runs/7/final med=org/medical-lora -o bank --max-error 0.02
    """
    out = out.expanduser()
    check_free(out, force=force)
    from adapterbank.bank import Bank
    from adapterbank.bank.advice import advice

    with bars() as tell:
        bank = Bank.fit(
            adapters, ratio=ratio, budget=budget, max_error=max_error, k=k, method=method.value, mean=mean.value,
            balance=balance, quantize=not no_quantize, base=base, skip_bad=skip_bad, allow_pickle=allow_pickle,
            seed=seed, progress=tell,
        )  # fmt: skip
        tell("does sharing pay?", 0, 1)
        found = advice(bank, adapters, allow_pickle=allow_pickle)
    save_new(bank, out)
    if as_json:
        print_json({"bank": str(out), **report(bank), "advice": asdict(found)})
        return
    print_members(bank, f"Bank {out}")
    if not found.pays or found.only_start:
        say(found.text)
    say_refused(bank)


def add(
    bank: BankPath,
    adapters: Adapters,
    max_error: Annotated[
        float | None,
        typer.Option(metavar="E", help="Largest relative error of these updates instead of the bank's."),
    ] = None,
    base: BaseId = None,
    skip_bad: SkipBad = False,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
) -> None:
    """Add adapters to a bank, coded on the basis it has.

    The basis learns nothing from them; absorb fits it again. Tasks that were trained in the bank keep their
    coefficients exactly; with --max-error they are coded in a fraction of those bytes.

    Example: adapterbank add bank adapters/new
    """
    from adapterbank.bank import Bank

    with bars() as tell, Bank.edit(bank) as changed:
        names = changed.add(
            adapters, max_error=max_error, base=base, skip_bad=skip_bad, allow_pickle=allow_pickle, progress=tell
        )
    if as_json:
        members = [member(changed, name) for name in names]
        print_json({"added": members, "bytes": changed.bytes, "refused": [asdict(r) for r in changed.refused]})
        return
    print_members(changed, f"Added to {bank}", names)
    say_refused(changed)


def absorb(
    bank: BankPath,
    adapters: Adapters,
    original: Annotated[
        list[str] | None,
        typer.Option(metavar="ADAPTER", help="Take this old member from its files; may be given several times."),
    ] = None,
    base: BaseId = None,
    skip_bad: SkipBad = False,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
) -> None:
    """Fit a bank again with new adapters in it, so that the basis learns from them.

    Old members are taken as the bank holds them, so their errors add up, unless --original gives their files.

    Example: adapterbank absorb bank adapters/new --original adapters/old
    """
    from adapterbank.adapters import LoraAdapter
    from adapterbank.bank import Bank
    from adapterbank.bank.family import named_sources

    with bars() as tell, Bank.edit(bank) as changed:
        opened = [
            source
            if isinstance(source, LoraAdapter)
            else LoraAdapter.load(source, name=name, allow_pickle=allow_pickle)
            for name, source in named_sources(original or [])
        ]
        changed.absorb(
            adapters, originals={adapter.name: adapter for adapter in opened}, base=base, skip_bad=skip_bad,
            allow_pickle=allow_pickle, progress=tell,
        )  # fmt: skip
    if as_json:
        print_json({"bank": bank, **report(changed)})
        return
    print_members(changed, f"Bank {bank}")
    say_refused(changed)


def report(bank: "Bank") -> dict[str, Any]:
    """A bank, its members and who was left out, as JSON."""
    return {**describe(bank), "refused": [asdict(refused) for refused in bank.refused]}


def say_refused(bank: "Bank") -> None:
    """List the adapters that were left out."""
    if bank.refused:
        say(f"Left out {count(len(bank.refused), 'adapter')}:", *(f"{r.name}: {r.reason}" for r in bank.refused))


def check_free(out: Path, *, force: bool) -> None:
    """Refuse a target before the work instead of after it.

    Raises:
        typer.Exit: If a bank or something else is there, or it can't be written.
    """
    if out.exists() and not out.is_dir():
        fail(f"{out} is a file; give a directory for the bank")
    if (out / "bank.json").exists():
        if not force:
            fail(f"{out} holds a bank already; give another directory, or replace it with --force")
    elif out.is_dir():
        from adapterbank.bank import store

        store.check_free(out)
    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not os.access(nearest, os.W_OK):
        fail(f"{out} can't be written: no permission in {nearest}")


def save_new(bank: "Bank", out: Path) -> None:
    """Save, and leave nothing behind if that fails where no bank was."""
    fresh = [path for path in (out, *out.parents) if not path.exists()]
    before = set(out.iterdir()) if out.exists() else set()
    try:
        bank.save(out)
    except BaseException:
        if not (out / "bank.json").exists():
            with suppress(OSError):
                for path in set(out.iterdir()) - before:
                    path.unlink()
                for path in fresh:
                    path.rmdir()
        raise
