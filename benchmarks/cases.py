"""What is measured: one TOML file per case."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomllib

CASES = Path(__file__).parent / "cases"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One case: ``kind`` names the module that runs it, everything else is that module's."""

    name: str
    kind: str
    title: str
    fields: dict[str, Any]


def load_cases(names: list[str]) -> list[Case]:
    """Cases by name, or all of them.

    Raises:
        SystemExit: If there is no case of a name.
    """
    known = {path.stem: path for path in sorted(CASES.glob("*.toml"))}
    for name in names:
        if name not in known:
            raise SystemExit(f"Error: there is no case {name!r}; there are {', '.join(known)}")
    return [_load(name, known[name]) for name in names or known]


def _load(name: str, path: Path) -> Case:
    fields = tomllib.loads(path.read_text())
    return Case(name=name, kind=fields.pop("kind"), title=fields.pop("title"), fields=fields)
