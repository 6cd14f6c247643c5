"""An orthonormal basis of every module for training and serving, also where the bank stores fewer directions.

Stored directions come first, made exactly orthonormal. Missing ones are derived from the decoded members: the leading
directions of what the stored ones leave of them. Both are deterministic; a fingerprint names the recipe, a probe
tells whether this machine's arithmetic came to the same result.
"""

import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from adapterbank.bank.coding import PlainBasis, PlainSide
from adapterbank.bank.statistics import even_sample
from adapterbank.codec.predictive import SideBasis
from adapterbank.errors import BankError
from adapterbank.subspace.completion import complete, orthonormal, probe, random_directions
from adapterbank.subspace.updates import thin_svd

if TYPE_CHECKING:
    from adapterbank.bank.bank import Bank

DEFAULT_K = 32
ENOUGH_ROWS = 16
"""Rows per wanted direction after which more members are not read: 512 rows tell the 32 leading directions."""
PROBE_TOLERANCE = 0.01
"""Two results of one recipe may differ so much: a single direction turned by more than about a degree shows."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SharedBasis:
    """Basis of one module: ``A' = coef_A @ V + mean_in``, ``B' = U @ coef_B + mean_out``.

    In flat banks (``fold > 1``) one direction is a whole factor of rank ``fold``, laid out row after row.
    """

    V: Float[Tensor, "k_in w_in"]
    """Orthonormal rows of ``fold * d_in`` values."""
    U: Float[Tensor, "w_out k_out"]
    """Orthonormal columns of ``fold * d_out`` values."""
    fold: int = 1
    mean_in: Float[Tensor, " w_in"] | None = None
    """Mean row of every ``A``; only in banks of the papers' methods."""
    mean_out: Float[Tensor, " w_out"] | None = None
    stored: tuple[int, int] = (0, 0)
    """How many of ``k_in`` and ``k_out`` the bank stores; the rest is derived."""

    @property
    def k(self) -> tuple[int, int]:
        """``(k_in, k_out)``."""
        return int(self.V.shape[0]), int(self.U.shape[1])

    @property
    def sizes(self) -> tuple[int, int]:
        """``(d_in, d_out)``."""
        return int(self.V.shape[1]) // self.fold, int(self.U.shape[0]) // self.fold


@dataclass(frozen=True, kw_only=True, eq=False)
class BankBasis:
    """Basis of all modules of a bank."""

    modules: Mapping[str, SharedBasis]
    k: int
    """Directions a side that were asked for; narrow modules have fewer."""
    members: int
    """Derived directions come from so many ordinary members, the first ones; 0: nothing is derived."""
    fingerprint: str
    """Hash of the recipe: the stored basis, ``k`` and the members that directions are derived from; random directions
    are not in it."""

    @cached_property
    def probe(self) -> float:
        """One number that changes when any direction does, up to rounding."""
        places = [(i, j, rows) for i, b in enumerate(self.modules.values()) for j, rows in enumerate((b.V, b.U.T))]
        return sum((probe(rows, float(i), float(2 * i + j)) for i, j, rows in places), 0.0)

    def check(self, fingerprint: str | None, probe: float | None, where: str) -> None:
        """Compare with what a trained adapter was told.

        Args:
            fingerprint: Of the adapter's basis; none: nothing to compare.
            probe: Of the adapter's basis.
            where: How errors call the adapter.

        Raises:
            BankError: If this is another basis.
        """
        if fingerprint is not None and fingerprint != self.fingerprint:
            raise BankError(
                f"{where} was trained on the basis {fingerprint}, this bank's is {self.fingerprint}: it was fitted "
                "again, or members that its directions come from are gone; give the bank as it was then"
            )
        if probe is not None and not math.isclose(probe, self.probe, abs_tol=PROBE_TOLERANCE):
            raise BankError(
                f"{where} was trained on the basis {self.fingerprint}, which this machine's arithmetic derives "
                "differently (two directions of equal weight, or other random ones); store them with Bank.compact, or "
                "save with save_basis"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "BankBasis":
        return self  # never changed, so copies of a model may share it


def shared_basis(bank: "Bank", k: int | None = None, *, members: int | None = None) -> BankBasis:
    """See :meth:`adapterbank.Bank.basis`."""
    if k is not None and k < 0:
        raise BankError(f"k={k} is no number of directions; give 0 or more")
    wanted = DEFAULT_K if k is None else k
    stored = [(_stored(b.side_in), _stored(b.side_out)) for b in bank.bases]
    sides = [(b.side_in, b.side_out) for b in bank.bases]
    lacking = [
        tuple(len(rows) < min(wanted, rows.shape[1]) and _derivable(side) for rows, side in zip(r, s, strict=True))
        for r, s in zip(stored, sides, strict=True)
    ]
    derived = any(any(pair) for pair in lacking)
    names = basis_members(bank)[:members]
    if derived and members is not None and len(names) < members:
        raise BankError(
            f"the basis was derived from {members} members, this bank has {len(names)}: it is another bank, or members "
            "were removed; give the bank as it was when the adapter was trained"
        )
    rows = _MemberRows(bank, names, wanted) if derived else None
    ranks = sum(bank[name].r for name in names)
    modules = {}
    for place, (module, pair, kinds) in enumerate(zip(bank.index.modules, stored, sides, strict=True)):
        full = []
        for place_of_side, (own, missing) in enumerate(zip(pair, lacking[place], strict=True)):
            blocks = rows.of(module.name, place_of_side) if rows is not None and missing else ()
            full.append(complete(own, blocks, wanted))
        for found, side, letter in zip(full, kinds, ("input", "output"), strict=True):
            _check_k(k, found, side, f"{module.name} on its {letter} side", ranks)
        fold, mean_in, mean_out = _plain_parts(*kinds)
        modules[module.name] = SharedBasis(
            V=full[0], U=full[1].T.contiguous(), fold=fold, mean_in=mean_in, mean_out=mean_out,
            stored=(min(len(pair[0]), wanted), min(len(pair[1]), wanted)),
        )  # fmt: skip
    if wanted and not any(min(basis.k) for basis in modules.values()):
        raise BankError("the bank has no directions: it has no members that change the base model; add adapters")
    used = names if derived else []
    # without directions of its own one bank is as good as another of the same layers
    layers = [[module.name, module.d_in, module.d_out] for module in bank.index.modules]
    recipe = [bank.index.basis, wanted, [bank[name].sha256 for name in used]] if wanted else ["", 0, layers]
    fingerprint = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]
    return BankBasis(modules=modules, k=wanted, members=len(used), fingerprint=fingerprint)


def with_random(basis: BankBasis, count: int, seed: int) -> BankBasis:
    """A basis with seeded random directions after its own; its probe covers them.

    Args:
        basis: The bank's.
        count: Random directions a side of each module.
        seed: Of the draw.

    Raises:
        BankError: If there is no room for them, or a direction is a whole factor.
    """
    modules = {}
    for name, part in basis.modules.items():
        if part.fold > 1:
            raise BankError(f"{name}: a flat basis has no random directions beside it; fit the bank by product")
        V, U = beside_random(part.V, part.U, count, seed=seed, module=name)
        modules[name] = replace(part, V=V, U=U)
    return replace(basis, modules=modules)


def beside_random(
    V: Float[Tensor, "k_in d_in"], U: Float[Tensor, "d_out k_out"], count: int, *, seed: int, module: str
) -> tuple[Float[Tensor, "rows d_in"], Float[Tensor, "d_out columns"]]:
    """A basis with seeded random directions after its own, the same ones whenever they are drawn.

    Args:
        V: Input basis.
        U: Output basis.
        count: Directions a side.
        seed: Of the task.
        module: The bank's name of the layer.

    Raises:
        BankError: If there is no room for so many.
    """
    # of the module's name too: equal directions in all layers would be no random ones
    drawn = zlib.crc32(f"{seed} {module}".encode())
    try:
        more_V = random_directions(count, V.shape[1], V, seed=drawn)
        more_U = random_directions(count, U.shape[0], U.T, seed=drawn + 1).T
    except BankError as error:
        raise BankError(f"{module}: {error}") from error
    return torch.cat([V, more_V]), torch.cat([U, more_U], dim=1)


def basis_members(bank: "Bank") -> list[str]:
    """Names of the members that directions are derived from, in order: all but trained tasks.

    Those lie in the basis that they were trained on. Without them a basis stays the same while tasks join the bank.
    """
    return [name for name, entry in bank.index.members.items() if entry.task is None]


class _MemberRows:
    """Weighted singular vectors of an even sample of members, by module and side."""

    def __init__(self, bank: "Bank", names: Sequence[str], k: int) -> None:
        rank = max([1, *(bank[name].r for name in names)])
        most = max(8, -(-ENOUGH_ROWS * k // rank))
        self._rows: dict[tuple[str, int], list[Tensor]] = {}
        # by content: a rename must not change the sample
        for i in even_sample([bank[name].sha256 for name in names], most):
            adapter = bank.reconstruct(names[i])
            updates = {m: thin_svd(f.A, f.B, f.scale) for m in adapter.modules for f in (adapter.factors(m),)}
            norm = math.sqrt(sum(float(u.S.double().square().sum()) for u in updates.values()))
            for module, update in updates.items():
                if norm:
                    weight = (update.S / norm)[:, None]
                    self._rows.setdefault((module, 0), []).append(weight * update.Vh)
                    self._rows.setdefault((module, 1), []).append(weight * update.U.T)

    def of(self, module: str, side: int) -> Iterator[Tensor]:
        """Rows of the input side (0) or the output side (1), let go as they are taken."""
        rows = self._rows.pop((module, side), [])
        while rows:
            yield rows.pop(0)


def _stored(side: SideBasis | PlainSide) -> Float[Tensor, "p d"]:
    if isinstance(side, SideBasis):
        return orthonormal(side.vectors)
    return orthonormal(side.rows) if side.k else torch.zeros(0, side.rows.shape[1])


def _derivable(side: SideBasis | PlainSide) -> bool:
    # members of a plain bank lie in the stored rows, where there are any: beyond them is rounding
    return isinstance(side, SideBasis) or (side.k == 0 and side.fold == 1 and side.mean is None)


def _check_k(k: int | None, found: Tensor, side: SideBasis | PlainSide, where: str, ranks: int) -> None:
    count, d = found.shape
    if k is None or count >= min(k, d):
        return
    if not _derivable(side):
        raise BankError(f"{where} has {count} directions stored, not k={k}; fit the bank with a larger k")
    if ranks < min(k, d):
        raise BankError(f"{where} can't give k={k} directions: the bank's adapters have rank {ranks} together; lower k")


def _plain_parts(side_in: Any, side_out: Any) -> tuple[int, Tensor | None, Tensor | None]:
    if isinstance(side_in, SideBasis):
        return 1, None, None
    basis = PlainBasis(side_in=side_in, side_out=side_out)
    return basis.side_in.fold, basis.side_in.mean, basis.side_out.mean
