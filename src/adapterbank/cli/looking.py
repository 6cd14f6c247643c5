"""Commands that change nothing: info, diagnose, verify."""

from typing import TYPE_CHECKING, Annotated

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
    print_table,
    say,
)
from adapterbank.cli.members import describe, print_members

if TYPE_CHECKING:
    from adapterbank import Diagnosis

WORSE = 1.01
"""A member may be so much worse than recorded: rounding differs between machines."""


def info(bank: BankPath, as_json: Json = False) -> None:
    """Show what is in a bank, what it weighs and what it lost.

    Example: adapterbank info bank
    """
    from adapterbank.bank import Bank

    opened = Bank.load(bank)
    if as_json:
        print_json({"bank": bank, **describe(opened)})
        return
    print_members(opened, f"Bank {bank}")
    index = opened.index
    asked = ", ".join(f"{key} {value}" for key, value in index.parameters.items())
    directions = [k for sides in opened.directions().values() for k in sides] or [0]
    least, most = min(directions), max(directions)
    say(
        f"Method {index.method}, {index.coding} values{', ' if asked else ''}{asked}; "
        f"{f'{least} to ' * (least != most)}{most} shared directions a side."
    )


def diagnose(
    adapters: Adapters,
    k: Annotated[
        int | None, typer.Option("-k", metavar="K", help="Directions a side at which spectra are read.")
    ] = None,
    base: BaseId = None,
    skip_bad: SkipBad = False,
    allow_pickle: AllowPickle = False,
    seed: Annotated[int, typer.Option(help="Of the random updates that the real ones are compared with.")] = 0,
    as_json: Json = False,
) -> None:
    """Find out whether a shared basis would pay, before fitting a bank.

    Compares the spectra with chance, finds adapters that merely began with the same random A, leaves adapters out in
    turn, and counts the bytes that int8, int4, truncated SVD and a bank need at the same error. Of more than 64
    adapters or 24 modules an even sample is examined.

    Example: adapterbank diagnose adapters/*/
    """
    from adapterbank.bank.diagnose import diagnose as measure

    with bars() as tell:
        found = measure(
            adapters, k=k, base=base, skip_bad=skip_bad, allow_pickle=allow_pickle, seed=seed, progress=tell
        )
    if as_json:
        typer.echo(found.to_json())
    else:
        _print_diagnosis(found)


def _print_diagnosis(found: "Diagnosis") -> None:
    print_table(
        f"Energy in {found.k} directions a side, beside chance",
        ("module", "adapters", "input", "chance", "output", "chance", "error held out"),
        [
            (
                module.name,
                module.adapters,
                *(f"{share:.3f}" for share in (module.real_in, module.null_in, module.real_out, module.null_out)),
                "" if module.held_out_error is None else f"{module.held_out_error:.3f}",
            )
            for module in found.modules
        ],
    )
    methods = list(found.comparison[0].bytes) if found.comparison else []
    print_table(
        "Bytes at the same error of the update",
        ("error", *methods),
        [
            (f"{row.error:g}", *("-" if size is None else f"{size:,}" for size in row.bytes.values()))
            for row in found.comparison
        ],
    )
    say(
        f"Examined {len(found.adapters)} of {found.of_adapters} adapters and {len(found.modules)} of "
        f"{found.of_modules} modules; bytes are those of codes, 'alone' is the bank's coding without a basis."
    )
    for group in found.start_groups:
        names = ", ".join(group[:8]) + (f" and {len(group) - 8} more" if len(group) > 8 else "")
        say(f"The same random A at the start: {names}.")
    if found.outliers:
        say(f"Far from the others: {', '.join(found.outliers)}.")
    say(found.advice.text)
    for refused in found.refused:
        say(f"Left out {refused.name}: {refused.reason}")


def verify(bank: BankPath, adapters: Adapters, allow_pickle: AllowPickle = False, as_json: Json = False) -> None:
    """Measure members against their original adapters again, for instance before deleting those.

    Ends with exit code 1 if one is worse than the bank says.

    Example: adapterbank verify bank adapters/*/
    """
    from adapterbank.bank import Bank

    opened = Bank.load(bank)
    errors: dict[str, float] = {}
    with bars() as tell:
        for done, adapter in enumerate(adapters, start=1):
            errors |= opened.verify([adapter], allow_pickle=allow_pickle)
            tell("comparing", done, len(adapters))
    promised = opened.errors()
    worse = [name for name, error in errors.items() if not error <= WORSE * promised[name] + 1e-6]

    def verdict(name: str) -> str:
        return "worse" if name in worse else "within the bound" if opened[name].bound else "as recorded"

    if as_json:
        members = [
            {"name": name, "error": error, "recorded": promised[name], "ok": name not in worse}
            for name, error in errors.items()
        ]
        print_json({"bank": bank, "ok": not worse, "members": members})
    else:
        rows = [
            (name, f"{error:.6f}", f"{'≤ ' * opened[name].bound}{promised[name]:.6f}", verdict(name))
            for name, error in errors.items()
        ]
        print_table(f"Members of {bank}", ("adapter", "error", "recorded", "verdict"), rows)
        if len(errors) < len(opened):
            say(f"Not compared: {count(len(opened) - len(errors), 'other member')}.")
    if worse:
        fail(f"worse than recorded: {', '.join(worse)}; keep the originals")
