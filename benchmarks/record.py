"""Results as committed JSON: what was measured, with which versions, where in general words, from which commit."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("adapterbank", "torch", "numpy", "constriction", "peft", "transformers", "lorashare", "vlora-dev")


def write_result(name: str, result: dict[str, Any], seed: int) -> Path:
    """Write ``results/NAME.json``, with everything that is needed to judge the numbers."""
    about = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "seed": seed,
        "machine": machine(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"about": about, **rounded(result)}, indent=1) + "\n")
    return path


def read_results() -> dict[str, dict[str, Any]]:
    """Every committed result by the name of its case."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def commit() -> str:
    """The commit that is measured."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()

    # what a benchmark measures is src; its own files change with every result it writes
    changed = git("status", "--porcelain", "--", "src")
    return git("rev-parse", "--short=10", "HEAD") + (" with changes in src" if changed else "")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine() -> str:
    """The processor, in words."""
    return f"{_processor()}, {os.cpu_count()} cores"


def rounded(value: Any) -> Any:
    """Floats to five digits: more is noise, and the files are read by people."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value
