"""Tables for the generated pages."""

from collections.abc import Sequence
from typing import Any


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; all columns but the first to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def targets(result: dict[str, Any]) -> str:
    """One line on what was aimed at and what was reached."""
    told = [
        f"{t['name'].replace('_', ' ')} {t['reached']:.3g} "
        f"({'at most' if 'at_most' in t else 'at least'} {t.get('at_most', t.get('at_least')):g}: "
        f"{'met' if t['met'] else 'missed'})"
        for t in result["targets"]
    ]
    return f"Targets: {', '.join(told)}."
