"""Whether an update goes through the basis or through built factors: which is faster, and which the layer takes."""

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from adapterbank.tuner import EigenLoraConfig
from adapterbank.tuner import layer as tuner_layer
from adapterbank.tuner.basis import LayerBasis
from benchmarks.cases import Case

MODES = ("inference", "training")


def run(case: Case, seed: int) -> dict[str, Any]:
    """The layer's own code on a grid, sent one way and the other in turn."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    fields = case.fields
    rest = torch.zeros(fields["rest_mb"] * 2**18)
    rows = [
        row
        for d, k, r in product(fields["d"], fields["k"], fields["r"])
        if r <= k  # more coefficients than directions make no sense, and the layer refuses them
        for row in _measure(_layer(d, k, r), fields, rest)
    ]
    for row in rows:
        row["right"] = _right(_chosen(row), row["basis_over_built"], fields["tie"])
    right = {mode: _share(row["right"] for row in rows if row["mode"] == mode) for mode in MODES}
    limit = fields["targets"]["right_at_least"]
    return {
        "title": case.title,
        **{name: fields[name] for name in ("tie", "rest_mb")},
        "points": len(rows) // len(MODES),
        "right": right,
        "cost_of_choice": {mode: _cost([row for row in rows if row["mode"] == mode]) for mode in MODES},
        "fitted": {mode: _fitted([row for row in rows if row["mode"] == mode], fields["tie"]) for mode in MODES},
        "targets": [{"name": m, "at_least": limit, "reached": v, "met": v >= limit} for m, v in right.items()],
        "rows": rows,
    }


def _layer(d: int, k: int, r: int) -> Any:
    basis = LayerBasis(id="basis", V=_orthonormal(k, d), U=_orthonormal(k, d).T, k=(k, k), fold=1)
    layer = tuner_layer.Linear(nn.Linear(d, d), "default", basis, EigenLoraConfig(r=r, k=k, start="random"))
    layer.base_layer.requires_grad_(False)
    return layer


def _orthonormal(k: int, d: int) -> Tensor:
    return torch.linalg.qr(torch.randn(d, k)).Q.T.contiguous()


def _measure(layer: Any, fields: dict[str, Any], rest: Tensor) -> Iterator[dict[str, Any]]:
    d, (k, _), r = layer.in_features, layer.basis_of["default"].k, layer.r["default"]
    for tokens, mode in product(fields["tokens"], MODES):
        x, result = torch.randn(2, tokens, d)
        x.requires_grad_(mode == "training")  # as anywhere but in a model's first layer
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for i in range(-1, fields["rounds"]):
            for through in (True, False) if i % 2 else (False, True):
                with patch.object(tuner_layer, "cheaper_through_basis", lambda *_, t=through: t):
                    taken = _seconds(layer, x, result, rest, is_training=mode == "training")
                if i >= 0:
                    seconds[through].append(taken)
        ratio = median(a / b for a, b in zip(seconds[True], seconds[False], strict=True))
        yield {
            "d": d, "k": k, "r": r, "tokens": tokens, "mode": mode, "built_seconds": median(seconds[False]),
            "basis_over_built": ratio,
        }  # fmt: skip


def _seconds(layer: Any, x: Tensor, result: Tensor, rest: Tensor, *, is_training: bool) -> float:
    """CPU seconds of the update alone; the base layer would hide it."""

    def timed(job: Callable[[], Any]) -> tuple[Any, float]:
        rest.add_(1)  # the rest of the model goes through the caches in between
        start = time.process_time()
        out = job()
        return out, time.process_time() - start

    with torch.set_grad_enabled(is_training):
        out, forward = timed(lambda: layer._plus(result, x, "default"))
    if not is_training:
        return forward
    trained = [x, *layer.eig_coef_A.values(), *layer.eig_coef_B.values()]
    return forward + timed(lambda: torch.autograd.grad(out, trained, result))[1]


def _chosen(row: dict[str, Any]) -> bool:
    return tuner_layer.cheaper_through_basis(row["r"], row["k"], row["tokens"], row["mode"] == "training")


def _right(chosen: bool, ratio: float, tie: float) -> bool:
    return chosen == (ratio < 1) or max(ratio, 1 / ratio) <= 1 + tie


def _share(found: Iterable[bool]) -> float:
    values = list(found)
    return sum(values) / len(values)


def _cost(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Time over that of always taking the faster side: geometric means over the grid, of the rule and of two others."""

    def over_best(chosen: Callable[[dict[str, Any]], bool]) -> float:
        logs = [
            torch.tensor((row["basis_over_built"] if chosen(row) else 1.0) / min(row["basis_over_built"], 1.0)).log()
            for row in rows
        ]
        return float(torch.stack(logs).mean().exp())

    return {
        "rule": over_best(_chosen),
        "always_basis": over_best(lambda _: True),
        "always_built": over_best(lambda _: False),
    }


def _fitted(rows: list[dict[str, Any]], tie: float) -> dict[str, float]:
    """The best rule of the form ``tokens * (k - rank_factor * r) < limit``."""

    def right(rank_factor: float, limit: int) -> float:
        return _share(
            _right(row["tokens"] * (row["k"] - rank_factor * row["r"]) < limit, row["basis_over_built"], tie)
            for row in rows
        )

    grid = product((1.0, 1.5, 2.0, 3.0, 4.0), (128, 256, 512, 1024, 2048, 4096, 8192, 16384))
    share, rank_factor, limit = max((right(*pair), *pair) for pair in grid)
    return {"rank_factor": rank_factor, "limit": limit, "right": share}
