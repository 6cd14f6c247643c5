"""How much of all members' factors the first so many directions of a layer hold (the paper's figure 3)."""

from collections.abc import Sequence
from typing import Any

import torch

from adapterbank.adapters import LoraAdapter, LoraFactors
from adapterbank.subspace.updates import balanced, thin_svd

COUNTS = (1, 2, 4, 8, 16, 32, 64)
"""Directions a side."""


def turned(adapters: Sequence[LoraAdapter]) -> list[LoraAdapter]:
    """Updates with the same singular values in random directions: what they'd share by counting alone."""
    made = []
    for i, adapter in enumerate(adapters):
        seeded, factors = torch.Generator().manual_seed(i), {}
        for module in adapter.modules:
            found = adapter.factors(module)
            update = thin_svd(found.A, found.B, found.scale)
            V, U = (torch.linalg.qr(torch.randn(f.shape, generator=seeded))[0] for f in (update.Vh.T, update.U))
            factors[module] = LoraFactors(A=V.T.contiguous(), B=U * update.S, scale=1.0)
        made.append(LoraAdapter.from_factors(f"turned-{i}", factors, base=adapter.base))
    return made


def spectrum(adapters: Sequence[LoraAdapter]) -> dict[str, Any]:
    """Cumulative share of energy by side: its mean over the modules, the lowest and the highest.

    Of balanced factors, so that it doesn't depend on how an update is divided between A and B.
    """
    shares: dict[str, list[torch.Tensor]] = {"in": [], "out": []}
    for module in adapters[0].modules:
        pairs = [balanced(thin_svd(f.A, f.B, f.scale)) for f in (adapter.factors(module) for adapter in adapters)]
        sides = {"in": [A for A, _ in pairs], "out": [B.T for _, B in pairs]}
        for side, rows in sides.items():
            energy = torch.linalg.svdvals(torch.cat(rows)).square().cumsum(0)
            shares[side].append(energy[[min(k, len(energy)) - 1 for k in COUNTS]] / energy[-1])
    found: dict[str, Any] = {"directions": list(COUNTS), "rows": sum(a.modules[module].rank for a in adapters)}
    for side, rows in shares.items():
        stacked = torch.stack(rows)
        found[side] = {
            "mean": stacked.mean(0).tolist(), "low": stacked.amin(0).tolist(), "high": stacked.amax(0).tolist(),
        }  # fmt: skip
    return found
