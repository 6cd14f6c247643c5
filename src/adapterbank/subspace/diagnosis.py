"""Does a shared basis pay? One module's updates against chance, and all modules of a family of adapters together.

An explained share means nothing alone: with as many directions as rows any spectrum is explained. Every number here has
its null, or its held-out twin, beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from adapterbank.errors import BankError
from adapterbank.subspace.choose import explained
from adapterbank.subspace.heldout import HeldOutReport, leave_one_out, outliers, relative_errors
from adapterbank.subspace.moments import SecondMoment
from adapterbank.subspace.product import equal_weights, input_rows, output_rows
from adapterbank.subspace.starts import StartReport, connected, same_start
from adapterbank.subspace.updates import ThinUpdate


@dataclass(frozen=True, kw_only=True, eq=False)
class SpectrumReport:
    """Energy that the leading directions explain, beside updates of the same strength in random directions."""

    rows: int
    """Stacked rows, ``sum of r``: with ``k`` near it any spectrum looks explained."""
    real_in: Float[Tensor, " q_in"]
    """Cumulative share of energy, input side: entry ``k - 1`` is what ``k`` directions explain."""
    null_in: Float[Tensor, " q_in"]
    """The same for the null, mean over its draws."""
    real_out: Float[Tensor, " q_out"]
    """Cumulative share of energy, output side."""
    null_out: Float[Tensor, " q_out"]
    """The same for the null, mean over its draws."""

    def at(self, k: int) -> tuple[float, float, float, float]:
        """``(real_in, null_in, real_out, null_out)`` with ``k`` directions, or all where there are fewer."""
        real_in, null_in, real_out, null_out = (
            float(share[min(k, len(share)) - 1]) for share in (self.real_in, self.null_in, self.real_out, self.null_out)
        )
        return real_in, null_in, real_out, null_out


def spectrum_against_null(updates: Sequence[ThinUpdate], *, draws: int = 2, seed: int = 0) -> SpectrumReport:
    """Spectrum of the stacked updates and of a strength-matched null.

    The null keeps every update's singular values and replaces its singular vectors by random orthonormal ones. Updates
    count equally, as in the fit.

    Args:
        updates: Updates of one module, one per adapter.
        draws: Nulls to average.
        seed: Seed of the nulls.

    Raises:
        BankError: If there are no updates or no draws.
    """
    if not updates or draws < 1:
        raise BankError("a spectrum needs at least one update and one draw of the null")
    generator = torch.Generator().manual_seed(seed)
    real_in, real_out = _explained_sides(updates)
    nulls = [_explained_sides([_randomised(u, generator) for u in updates]) for _ in range(draws)]
    return SpectrumReport(
        rows=sum(len(update.S) for update in updates),
        real_in=real_in,
        null_in=torch.stack([null for null, _ in nulls]).mean(dim=0),
        real_out=real_out,
        null_out=torch.stack([null for _, null in nulls]).mean(dim=0),
    )


def _explained_sides(updates: Sequence[ThinUpdate]) -> tuple[Float[Tensor, " q_in"], Float[Tensor, " q_out"]]:
    expected = sum(len(update.S) for update in updates)
    side_in = SecondMoment(updates[0].Vh.shape[1], expect_rows=expected)
    side_out = SecondMoment(updates[0].U.shape[0], expect_rows=expected)
    for update, weight in zip(updates, equal_weights(updates), strict=True):
        side_in.add(input_rows(update, weight))
        side_out.add(output_rows(update, weight))
    return explained(side_in.spectrum().sqrt()), explained(side_out.spectrum().sqrt())


def _randomised(update: ThinUpdate, generator: torch.Generator) -> ThinUpdate:
    U = torch.linalg.qr(torch.randn(update.U.shape, generator=generator)).Q
    Vh = torch.linalg.qr(torch.randn(update.Vh.T.shape, generator=generator)).Q.T
    return ThinUpdate(U=U.to(update.U.dtype), S=update.S, Vh=Vh.to(update.Vh.dtype))


@dataclass(frozen=True, kw_only=True)
class ModuleDiagnosis:
    """All measurements of one module."""

    members: tuple[int, ...]
    """Which adapters have the module, in the order of the reports."""
    spectrum: SpectrumReport
    """Spectrum against its null."""
    start: StartReport
    """Shared initialisations."""
    held_out: HeldOutReport | None
    """Leave-one-adapter-out error; none with a single adapter."""


def examine(
    updates: Sequence[ThinUpdate],
    factors: Sequence[Float[Tensor, "_ d_in"]],
    k: int,
    *,
    members: Sequence[int] | None = None,
    seed: int = 0,
) -> ModuleDiagnosis:
    """Measure one module.

    Args:
        updates: Its updates, one per adapter that has it.
        factors: ``A`` of the same adapters, as stored.
        k: Directions a side for the held-out error.
        members: Which adapters these are; ``0 .. n-1`` by default.
        seed: Seed of the null.

    Raises:
        BankError: If the counts differ or are zero.
    """
    who = tuple(range(len(updates))) if members is None else tuple(members)
    if not len(updates) == len(factors) == len(who):
        raise BankError(f"{len(updates)} updates, {len(factors)} A factors and {len(who)} members don't match")
    return ModuleDiagnosis(
        members=who,
        spectrum=spectrum_against_null(updates, seed=seed),
        start=same_start(factors),
        held_out=leave_one_out(updates, k) if len(updates) > 1 else None,
    )


@dataclass(frozen=True, kw_only=True)
class FamilyDiagnosis:
    """What all modules say together, with ``k`` directions a side."""

    k: int
    """Directions a side."""
    real_in: float
    """Share of energy explained on the input side, mean over modules."""
    null_in: float
    """The same by chance."""
    real_out: float
    """Share of energy explained on the output side, mean over modules."""
    null_out: float
    """The same by chance."""
    start_groups: tuple[tuple[int, ...], ...]
    """Adapters that share an initialisation of A in more than half of the modules both have."""
    mean_cosine: float
    """Mean cosine of A rows over pairs and modules."""
    held_out_errors: dict[int, float]
    """Relative error of each adapter's whole update in bases fitted without it."""
    inside_errors: dict[int, float]
    """The same in the bases of all."""
    outliers: tuple[int, ...]
    """Adapters far worse predicted than the others."""

    @property
    def shares(self) -> bool:
        """Whether either side beats chance by a tenth of what chance leaves unexplained, and by a hundredth of all."""
        sides = ((self.real_in, self.null_in), (self.real_out, self.null_out))
        return any(real - null > max(0.01, 0.1 * (1 - null)) for real, null in sides)


def combine(modules: Sequence[ModuleDiagnosis], k: int) -> FamilyDiagnosis:
    """Put the modules together: energies add, shares of energy average.

    Args:
        modules: Diagnosis of each module.
        k: Directions a side at which the spectra are read.

    Raises:
        BankError: If there is no module.
    """
    if not modules:
        raise BankError("no modules to put together")
    shares = torch.tensor([module.spectrum.at(k) for module in modules]).mean(dim=0).tolist()
    held_out, inside = _adapter_errors(modules)
    far = outliers(list(held_out.values()))
    return FamilyDiagnosis(
        k=k,
        real_in=shares[0],
        null_in=shares[1],
        real_out=shares[2],
        null_out=shares[3],
        start_groups=_start_groups(modules),
        mean_cosine=sum(module.start.mean_cosine for module in modules) / len(modules),
        held_out_errors=held_out,
        inside_errors=inside,
        outliers=tuple(list(held_out)[i] for i in far),
    )


def _adapter_errors(modules: Sequence[ModuleDiagnosis]) -> tuple[dict[int, float], dict[int, float]]:
    sums: dict[int, list[float]] = {}
    for module in modules:
        if module.held_out is not None:
            parts = zip(module.held_out.lost, module.held_out.lost_inside, module.held_out.energy, strict=True)
            for member, part in zip(module.members, parts, strict=True):
                sums[member] = [a + b for a, b in zip(sums.get(member, [0.0, 0.0, 0.0]), part, strict=True)]
    who = sorted(sums)
    energy = [sums[member][2] for member in who]
    held_out, inside = (relative_errors([sums[member][side] for member in who], energy) for side in (0, 1))
    return dict(zip(who, held_out, strict=True)), dict(zip(who, inside, strict=True))


def _start_groups(modules: Sequence[ModuleDiagnosis]) -> tuple[tuple[int, ...], ...]:
    n = 1 + max(max(module.members) for module in modules)
    together, both = torch.zeros(n, n), torch.zeros(n, n)
    for module in modules:
        who = torch.tensor(module.members)
        both[who[:, None], who] += 1
        for group in module.start.groups:
            same = who[list(group)]
            together[same[:, None], same] += 1
    return connected(together > both / 2)
