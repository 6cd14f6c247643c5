"""Members of a bank, as a table and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from adapterbank.cli.app import count, print_table, say

if TYPE_CHECKING:
    from adapterbank.bank import Bank, MemberEntry

FULL_TABLE, WORST = 40, 10
"""More members than this are summed up by those with the largest errors."""


def member(bank: "Bank", name: str) -> dict[str, Any]:
    """A member as JSON."""
    entry = bank[name]
    kept = {key: asdict(entry)[key] for key in ("bytes", "values", "r", "alpha", "error", "bound", "source_bytes")}
    return {"name": name, **kept, "ratio": _ratio(entry.values, entry.bytes)}


def describe(bank: "Bank") -> dict[str, Any]:
    """A bank and its members as JSON."""
    return {**bank.summary(), "members": [member(bank, name) for name in bank.names]}


def print_members(bank: "Bank", title: str, names: Sequence[str] | None = None) -> None:
    """Print what each member takes and lost, or the worst of many, and a line about the whole bank.

    Args:
        bank: The bank.
        title: Of the table.
        names: Members to list; all by default.
    """
    entries = {name: bank[name] for name in (bank.names if names is None else names)}
    shown = list(entries)
    if len(shown) > FULL_TABLE:
        shown = sorted(shown, key=lambda name: -entries[name].error)[:WORST]
        title += f", the {WORST} of {len(entries)} adapters with the largest errors"
    rows = [
        (
            name,
            f"{entry.bytes:,}",
            f"{_ratio(entry.values, entry.bytes):.1f}",
            error_text(entry),
        )
        for name, entry in ((name, entries[name]) for name in shown)
    ]
    summary = bank.summary()
    bound = "≤ " if any(entry.bound for entry in entries.values()) else ""
    # members of one content share a file
    shared = bank.bytes - sum({bank[name].sha256: bank[name].bytes for name in bank.names}.values())
    rows += [
        ("basis and index", f"{shared:,}", "", ""),
        ("whole bank", f"{bank.bytes:,}", f"{summary['ratio']:.1f}", f"{bound}{summary['error']:.4f}"),
    ]
    print_table(title, ("adapter", "bytes", "ratio", "error"), rows, last=2)
    say(
        f"{count(len(bank), 'adapter')} of {summary['base'] or 'an unnamed base'}, "
        f"{count(summary['modules'], 'module')}: "
        f"{summary['ratio']:.1f}x smaller than in 32 bits, {summary['ratio_to_sources']:.1f}x than the files were; "
        f"largest error {bound}{summary['largest_error']:.4f}."
    )


def error_text(entry: "MemberEntry") -> str:
    """A member's error, marked where it is a bound; a task whose coefficients are kept as they are has none."""
    return "exact" if entry.task and not entry.task.coded else f"{'≤ ' * entry.bound}{entry.error:.4f}"


def _ratio(values: int, size: int) -> float:
    return 4 * values / size if size else 0.0
