"""Tiny seeded updates with a known answer, and the statistics that the allocation reads of them."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from adapterbank.codec.allocate import ModuleStatistics, SideStatistics, basis_sizes
from adapterbank.codec.predictive import ModuleBasis, SideBasis
from adapterbank.subspace.product import fit_product
from adapterbank.subspace.updates import ThinUpdate, thin_svd


@pytest.fixture
def make_updates() -> Callable[..., list[ThinUpdate]]:
    """Updates whose directions lie ``noise``-close to ``shared`` planted ones; 0 plants nothing."""

    def make(
        n: int = 12, r: int = 4, d_in: int = 96, d_out: int = 80, shared: int = 6, noise: float = 0.1, seed: int = 0
    ) -> list[ThinUpdate]:
        generator = torch.Generator().manual_seed(seed)

        def rows(d: int, planted: torch.Tensor) -> torch.Tensor:
            private = torch.randn(r, d, generator=generator) / d**0.5
            if not shared:
                return private
            return torch.randn(r, shared, generator=generator) @ planted / shared**0.5 + noise * private

        planted = [torch.linalg.qr(torch.randn(d, max(shared, 1), generator=generator)).Q.T for d in (d_in, d_out)]
        return [thin_svd(rows(d_in, planted[0]), rows(d_out, planted[1]).T) for _ in range(n)]

    return make


@pytest.fixture
def statistics_of() -> Callable[..., ModuleStatistics]:
    """What the allocation knows of one module, from updates that are the whole of their adapters."""

    def of(updates: list[ThinUpdate], most: int = 24) -> ModuleStatistics:
        k = min(most, len(updates) * updates[0].S.numel())
        basis = fit_product(updates, k, k)
        weight = np.concatenate([(u.S.double() ** 2 / u.S.double().square().sum()).numpy() for u in updates])

        def side(rows: torch.Tensor, energy: torch.Tensor, vectors: list[torch.Tensor]) -> SideStatistics:
            sizes = basis_sizes(k)
            explained = [(v @ rows.T).double().square().cumsum(dim=1).numpy() for v in vectors]
            explained = np.pad(np.concatenate(explained), ((0, 0), (1, 0)))[:, sizes]
            return SideStatistics(
                width=rows.shape[1], sizes=sizes, explained=explained, direction_weight=energy[:k].double().numpy()
            )

        return ModuleStatistics(
            weight=weight,
            side_in=side(basis.V, basis.eigenvalues_in, [u.Vh for u in updates]),
            side_out=side(basis.U.T, basis.eigenvalues_out, [u.U.T for u in updates]),
        )

    return of


@pytest.fixture
def no_basis() -> Callable[[int, int], ModuleBasis]:
    """A module without shared directions."""

    def make(d_in: int, d_out: int) -> ModuleBasis:
        none = np.zeros(0, dtype=np.int64)
        side_in = SideBasis(vectors=torch.zeros(0, d_in), profile=none)
        return ModuleBasis(side_in=side_in, side_out=SideBasis(vectors=torch.zeros(0, d_out), profile=none))

    return make
