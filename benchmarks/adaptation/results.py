"""Lines of the committed results, one a run; no torch in here, so that pages can be made anywhere."""

import fcntl
import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Line = dict[str, Any]
"""A run's fields, its ``result``, its ``key``, and ``about``: where and with what it came to be."""


def load_results(part: str) -> dict[str, Line]:
    """Lines of a part's file by the key of their run."""
    path = RESULTS / f"{part}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {line["key"]: line for line in map(json.loads, lines)}


def append(line: Line) -> None:
    """Add a line to its part's file."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{line['part']}.jsonl").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another process may be running another selection
        file.write(json.dumps(line, separators=(",", ":")) + "\n")
