"""Tiny seeded tensors with a known answer."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor, float]


@pytest.fixture
def make_rows() -> Callable[..., Tensor]:
    """Rows of a given rank, singular values falling by halves."""

    def make(m: int = 12, d: int = 20, rank: int | None = None, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        rank = min(m, d) if rank is None else rank
        left = torch.randn(m, rank, generator=generator) * 0.5 ** torch.arange(rank)
        return left @ torch.randn(rank, d, generator=generator)

    return make


@pytest.fixture
def make_family() -> Callable[..., list[Factors]]:
    """Adapters whose input and output directions lie ``noise``-close to ``shared`` planted ones; -1 plants nothing."""

    def make(
        n: int = 5, r: int = 3, d_in: int = 24, d_out: int = 18, shared: int = 4, noise: float = 0.0, seed: int = 0
    ) -> list[Factors]:
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        E_in, E_out = torch.linalg.qr(randn(d_in, d_in)).Q.T, torch.linalg.qr(randn(d_out, d_out)).Q.T
        if shared > 0:
            E_in, E_out = E_in[:shared], E_out[:shared]
        family = []
        for _ in range(n):
            A = randn(r, len(E_in)) @ E_in + noise * randn(r, d_in)
            B = (randn(r, len(E_out)) @ E_out + noise * randn(r, d_out)).T
            family.append((A, B, 2.0))
        return family

    return make


@pytest.fixture
def regauge() -> Callable[..., Factors]:
    """The same update by other factors: ``(G A, B G^-1)``, with the scale moved into ``B`` in part."""

    def apply(factors: Factors, seed: int = 0) -> Factors:
        A, B, scale = factors
        generator = torch.Generator().manual_seed(seed)
        G = torch.eye(len(A)) + 0.3 * torch.randn(len(A), len(A), generator=generator)
        return G @ A, (B.double() @ torch.linalg.inv(G.double()) * 0.5).float(), 2 * scale

    return apply
