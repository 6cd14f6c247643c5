"""Time, memory, bytes and error of a fit, beside the two peers, in fresh processes and interleaved."""

import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from adapterbank.adapters import LoraAdapter
from adapterbank.bank import Bank
from benchmarks.cases import Case
from benchmarks.curves import Originals, Restored, scaled
from benchmarks.families import written
from benchmarks.processes import run_fresh
from benchmarks.rivals import disk_bytes


def run(case: Case, seed: int) -> dict[str, Any]:
    """Every tool once a round, so that whatever else the machine does hits all alike."""
    tools = case.fields["tool"]
    with (
        written(case.fields["family"]) as directories,
        tempfile.TemporaryDirectory(prefix="adapterbank-bench-") as scratch,
    ):
        measured: dict[str, list[dict[str, Any]]] = {tool["name"]: [] for tool in tools}
        for _ in range(case.fields["rounds"]):
            for tool in tools:
                out = Path(scratch) / tool["name"].replace(" ", "-")
                measured[tool["name"]].append(run_fresh(tool["job"], directories[0].parent, out, **tool["arguments"]))
        originals = Originals(directories)
        rows = [
            {
                "tool": tool["name"],
                "cpu_seconds": median(r["cpu_seconds"] for r in measured[tool["name"]]),
                "cpu_seconds_all": [r["cpu_seconds"] for r in measured[tool["name"]]],
                "peak_mb": max(r["peak_mb"] for r in measured[tool["name"]]),
                **_quality(tool["job"], Path(scratch) / tool["name"].replace(" ", "-"), originals),
            }
            for tool in tools
        ]
    return {
        "title": case.title,
        "adapters": len(originals.adapters),
        "bytes_fp32": 4 * originals.values,
        "rounds": case.fields["rounds"],
        "rows": rows,
        "targets": _targets(case.fields["targets"], rows),
    }


def _targets(targets: dict[str, float], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    ours, lorashare = rows[0], rows[1]
    reached = {
        "error": ours["error"],
        "peak_mb": ours["peak_mb"],
        "cpu_share_of_lorashare": ours["cpu_seconds"] / lorashare["cpu_seconds"],
    }
    return [
        {"name": name, "at_most": limit, "reached": reached[name], "met": reached[name] <= limit}
        for name, limit in targets.items()
    ]


def _quality(job: str, out: Path, originals: Originals) -> dict[str, float]:
    restored = {"fit_bank": _bank, "fit_lorashare": _lorashare, "fit_vlora": _vlora}[job](out)
    return {"ratio": 4 * originals.values / disk_bytes(out), "error": originals.error(restored)}


def _bank(out: Path) -> Any:
    bank = Bank.load(out)

    def restored(adapter: LoraAdapter) -> Restored:
        back = bank.reconstruct(adapter.name)
        return {m: (f.A, f.scale * f.B) for m in adapter.modules for f in [back.factors(m)]}

    return restored


def _lorashare(out: Path) -> Any:
    from lorashare import SHAREModel

    model = SHAREModel.from_pretrained(out)
    return lambda adapter: scaled(adapter, model.reconstruct(adapter.name))


def _vlora(out: Path) -> Any:
    from vlora import SharedSubspace

    space = SharedSubspace.load(out)

    def restored(adapter: LoraAdapter) -> Restored:
        weights = space.reconstruct(adapter.name)
        return {m: (weights.lora_a[m], adapter.scales[m] * weights.lora_b[m]) for m in adapter.modules}

    return restored
