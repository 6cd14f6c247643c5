"""Members of a bank as the engine keeps them: coefficients on the layers' bases, and what these can't hold."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from adapterbank.adapters import LoraAdapter
from adapterbank.bank import Bank
from adapterbank.bank.shared_basis import DEFAULT_K, SharedBasis
from adapterbank.errors import BankError
from adapterbank.runtime.packing import Packed

NOTHING = 1e-5
"""A remainder so much smaller than its factor is rounding."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerBasis:
    """What all rows share at one layer."""

    V: Float[Tensor, "k_in d_in"]
    U: Float[Tensor, "d_out k_out"]

    @classmethod
    def of(cls, basis: SharedBasis) -> "LayerBasis":
        """Orthonormal, with the means of a centred bank among the directions.

        A direction of a flat bank is a whole factor, which no token can be projected on: such a layer has none.
        """
        if basis.fold > 1:
            d_in, d_out = basis.sizes
            return cls(V=torch.zeros(0, d_in), U=torch.zeros(d_out, 0))
        return cls(V=_with(basis.V, basis.mean_in), U=_with(basis.U.T, basis.mean_out).T.contiguous())

    @property
    def bytes(self) -> int:
        """In memory."""
        return self.V.nbytes + self.U.nbytes


def _with(rows: Float[Tensor, "k d"], mean: Float[Tensor, " d"] | None) -> Float[Tensor, "_ d"]:
    if mean is None:
        return rows.contiguous()
    rest = mean - mean @ rows.T @ rows
    norm = rest.norm()
    return torch.cat([rows, (rest / norm)[None]]) if norm > NOTHING * mean.norm() else rows.contiguous()


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """One member at one layer: ``A' = coef_A @ V + private_A``, ``B' = (coef_B @ U.T + private_B).T``."""

    coef_A: Packed
    """``(r, k_in)``."""
    coef_B: Packed
    """``(r, k_out)``."""
    private_A: Packed | None
    """``(r, d_in)``; none where the basis holds all of it."""
    private_B: Packed | None
    """``(r, d_out)``."""

    @property
    def rank(self) -> int:
        """``r``."""
        return len(self.coef_A.codes)

    def factors(self, basis: LayerBasis) -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"]]:
        """``A', B'`` at scale 1, in float32."""
        A, B = self.coef_A.unpacked() @ basis.V, self.coef_B.unpacked() @ basis.U.T
        A = A if self.private_A is None else A + self.private_A.unpacked()
        return A, (B if self.private_B is None else B + self.private_B.unpacked()).T

    @property
    def shared_bytes(self) -> int:
        """Of the coefficients."""
        return self.coef_A.bytes + self.coef_B.bytes

    @property
    def private_bytes(self) -> int:
        """Of the remainders."""
        return sum(packed.bytes for packed in (self.private_A, self.private_B) if packed is not None)


@dataclass(frozen=True, kw_only=True, eq=False)
class Member:
    """One adapter, ready to serve."""

    name: str
    parts: Mapping[str, Part]
    """By the layer's name in the model."""
    heads: Mapping[str, Tensor]
    """Tensors of its task head, by name."""

    @property
    def bytes(self) -> int:
        """In memory."""
        parts = sum(part.shared_bytes + part.private_bytes for part in self.parts.values())
        return parts + sum(head.nbytes for head in self.heads.values())


def split(adapter: LoraAdapter, bases: Mapping[str, LayerBasis], layers: Mapping[str, str], bits: int) -> Member:
    """An adapter in the coordinates of the layers' bases.

    Args:
        adapter: With any ranks.
        bases: By layer of the model.
        layers: Layer of the model by the adapter's name for it.
        bits: Of a stored value.

    Raises:
        BankError: If the adapter has a module that the engine has no layer for, or of another size.
    """
    parts = {}
    for module in adapter.modules:
        factors = adapter.factors(module)
        if module not in layers:
            raise BankError(f"adapter {adapter.name!r}: the engine has no layer {module}; fit a bank that has it")
        basis = bases[layers[module]]
        if (factors.d_in, factors.d_out) != (basis.V.shape[1], basis.U.shape[0]):
            raise BankError(
                f"adapter {adapter.name!r}, {module}: it is {factors.d_out} x {factors.d_in}, the layer "
                f"{basis.U.shape[0]} x {basis.V.shape[1]}; is it of another base model?"
            )
        A, B = factors.A.float(), factors.scale * factors.B.float()
        coef_A, private_A = _divided(A, basis.V, bits)
        coef_B, private_B = _divided(B.T, basis.U.T, bits)
        parts[layers[module]] = Part(coef_A=coef_A, coef_B=coef_B, private_A=private_A, private_B=private_B)
    heads = {name: adapter.extra(name) for name in adapter.extra_names}
    return Member(name=adapter.name, parts=parts, heads=heads)


def _divided(rows: Float[Tensor, "r d"], basis: Float[Tensor, "k d"], bits: int) -> tuple[Packed, Packed | None]:
    coefficients = rows @ basis.T
    rest = rows - coefficients @ basis
    private = bool(rest.norm() > NOTHING * rows.norm())
    return Packed.of(coefficients, bits), Packed.of(rest, bits) if private else None


def directions(bank: Bank) -> int | None:
    """All that a layer stores or a task was trained on, if that is more than ``Bank.basis`` gives by itself."""
    counts = [max(pair) for pair in bank.directions().values()]
    counts += [entry.task.k or 0 for entry in bank.index.members.values() if entry.task is not None]
    return most if (most := max(counts, default=0)) > DEFAULT_K else None
