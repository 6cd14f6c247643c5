"""How time and memory grow with the number of adapters."""

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.families import written
from benchmarks.processes import run_fresh


def run(case: Case, seed: int) -> dict[str, Any]:
    """Fit, open and restore for each size and each setting, every step in a fresh process."""
    counts, settings = case.fields["counts"], case.fields["setting"]
    rows = []
    with written(case.fields["family"], n=max(counts)) as directories:
        for n in counts:
            # the first n of one family, seen through a folder of links
            with tempfile.TemporaryDirectory(prefix="adapterbank-bench-") as scratch:
                some = Path(scratch) / "adapters"
                some.mkdir()
                for directory in directories[:n]:
                    (some / directory.name).symlink_to(directory)
                for setting in settings:
                    out = Path(scratch) / "bank"
                    fit = run_fresh("fit_bank", some, out, **setting["arguments"])
                    use = run_fresh("open_and_restore", some, out)
                    rows.append({"adapters": n, "setting": setting["name"], **use, **fit})
    return {
        "title": case.title,
        "rows": rows,
        "growth": {
            setting["name"]: _growth([r for r in rows if r["setting"] == setting["name"]]) for setting in settings
        },
    }


def _growth(rows: list[dict[str, Any]]) -> dict[str, float]:
    small, middle, large = rows
    return {
        "peak_largest_over_middle": large["peak_mb"] / middle["peak_mb"],
        "cpu_seconds_per_adapter_small_to_middle": _slope(small, middle),
        "cpu_seconds_per_adapter_middle_to_largest": _slope(middle, large),
    }


def _slope(few: dict[str, Any], many: dict[str, Any]) -> float:
    return (many["cpu_seconds"] - few["cpu_seconds"]) / (many["adapters"] - few["adapters"])
