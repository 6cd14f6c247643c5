"""Error of the update against bytes: a bank, everything it competes with, and the bound."""

from dataclasses import asdict
from typing import Any

from adapterbank.adapters import LoraAdapter
from adapterbank.bank import Bank
from benchmarks.bound import gaussian_bound
from benchmarks.cases import Case
from benchmarks.curves import Originals, Point, Restored
from benchmarks.families import written
from benchmarks.rivals import RIVALS

TOLERANCE = 1.02
"""Bytes that a rival may have, over those of the bank."""


def run(case: Case, seed: int) -> dict[str, Any]:
    """Fit banks at the case's ratios and compare each with the best rival of as many bytes."""
    with written(case.fields["family"]) as directories:
        originals = Originals(directories)
        bank = [_bank_point(originals, ratio, seed) for ratio in case.fields["ratios"]]
        rivals: dict[str, list[Point]] = {}
        for measure in RIVALS:
            rivals |= measure(originals)
        bound = gaussian_bound(originals, [point.bytes for point in bank])
    full = 4 * originals.values
    rows = [_row(*columns, rivals, full) for columns in zip(case.fields["ratios"], bank, bound, strict=True)]
    return {
        "title": case.title,
        "adapters": len(originals.adapters),
        "modules": len(originals.adapters[0].modules),
        "rank": originals.adapters[0].rank,
        "bytes_fp32": full,
        "rows": rows,
        "targets": _targets(case.fields.get("targets", {}), rows),
        "never_worse": all(row["not_worse"] for row in rows),
        "rivals": {name: [{**asdict(p), "ratio": full / p.bytes} for p in points] for name, points in rivals.items()},
    }


def _bank_point(originals: Originals, ratio: float, seed: int) -> Point:
    bank = Bank.fit(originals.directories, ratio=ratio, seed=seed)

    def restored(adapter: LoraAdapter) -> Restored:
        back = bank.reconstruct(adapter.name)
        return {m: (f.A, f.scale * f.B) for m in adapter.modules for f in [back.factors(m)]}

    # decoded from its files and measured like the rivals, not taken from the bank's own word
    return Point(setting=f"ratio={ratio:g}", bytes=bank.bytes, error=originals.error(restored))


def _row(asked: float, bank: Point, bound: float, rivals: dict[str, list[Point]], full: int) -> dict[str, Any]:
    within = [(p.error, f"{name} {p.setting}".strip(), p) for name, ps in rivals.items() for p in ps
              if p.bytes <= bank.bytes * TOLERANCE]  # fmt: skip
    error, name, point = min(within, default=(None, None, None), key=lambda entry: entry[0])
    return {
        "asked": asked,
        "ratio": full / bank.bytes,
        "bytes": bank.bytes,
        "error": bank.error,
        "bound": bound,
        "over_bound": bank.error / bound,
        "best_rival": name,
        "best_rival_error": error,
        "best_rival_ratio": full / point.bytes if point else None,
        "not_worse": error is None or bank.error <= error,
    }


def _targets(targets: dict[str, float], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    reached = {f"{row['asked']:g}": row["error"] for row in rows}
    return [
        {"ratio": float(ratio), "at_most": limit, "error": reached[ratio], "met": reached[ratio] <= limit}
        for ratio, limit in targets.items()
    ]
