"""Rate-distortion: the error of the update against the ratio of bytes, for a bank and for what it competes with."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from adapterbank.adapters import LoraAdapter
from adapterbank.subspace.baselines import Rival, rivals
from adapterbank.subspace.updates import difference_norm, thin_svd


@dataclass(frozen=True, kw_only=True)
class Point:
    """What one setting of one method reaches on a family of adapters."""

    setting: str
    ratio: float
    """4 bytes x values of all A and B, over the bytes that the method needs; task heads apart."""
    error: float
    """Root mean square over the adapters of ``||dW - dW'||_F / ||dW||_F``."""


def baseline_curves(adapters: Sequence[LoraAdapter]) -> dict[str, list[Point]]:
    """Rounding and truncated SVD, one adapter at a time, by method."""
    curves: dict[str, list[Point]] = {}
    for name, rival in rivals(max(adapter.rank for adapter in adapters)).items():
        # svd4+int8 -> SVD + int8, one curve for all ranks; int4 stays alone
        method = re.sub(r"^svd\d+\+?", "SVD + ", name)
        method = "SVD, 16 bits" if method == "SVD + " else method
        curves.setdefault(method, []).append(_measure(adapters, name, rival))
    return curves


def rms(errors: Iterable[float]) -> float:
    """Root mean square: how the errors of a bank's members become one number."""
    squares = [error**2 for error in errors]
    return float((sum(squares) / len(squares)) ** 0.5)


def _measure(adapters: Sequence[LoraAdapter], setting: str, rival: Rival) -> Point:
    values = bytes_needed = 0
    errors = []
    for adapter in adapters:
        lost = energy = 0.0
        for module in adapter.modules:
            factors = adapter.factors(module)
            update, coded = thin_svd(factors.A, factors.B, factors.scale), rival(factors.A, factors.B, factors.scale)
            values += factors.A.numel() + factors.B.numel()
            bytes_needed += coded.bytes
            lost += difference_norm(update, coded.A, coded.B) ** 2
            energy += float(update.S.square().sum())
        errors.append((lost / energy) ** 0.5 if energy else 0.0)
    return Point(setting=setting, ratio=4 * values / bytes_needed, error=rms(errors))
