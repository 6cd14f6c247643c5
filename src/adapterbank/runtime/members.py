"""Members of a bank as the engine keeps them: coefficients on the layers' bases, and what these can't hold."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from adapterbank.adapters import LoraAdapter
from adapterbank.adapters.names import match_modules
from adapterbank.bank import Bank
from adapterbank.bank.shared_basis import DEFAULT_K, SharedBasis
from adapterbank.errors import BankError
from adapterbank.runtime.packing import Packed, check_bits

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


def _with(rows: Float[Tensor, "k d"], mean: Float[Tensor, " d"] | None) -> Float[Tensor, "_ d"]:
    if mean is None:
        return rows.contiguous()
    rest = mean - mean @ rows.T @ rows
    norm = rest.norm()
    return torch.cat([rows, (rest / norm)[None]]) if norm > NOTHING * mean.norm() else rows.contiguous()


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the coefficients of one layer are among all of a member: ``coef_A``, then ``coef_B`` transposed."""

    layer: str
    """Its name in the model."""
    r: int
    k_in: int
    k_out: int
    start: int
    """Of its values."""
    row: int
    """Of its rows, ``2 r`` of them."""

    def of(self, packed: Packed) -> tuple[Float[Tensor, "m r k_in"], Float[Tensor, "m k_out r"]]:
        """``coef_A`` and ``coef_B`` of stacked members, in float32."""
        middle = self.start + self.r * self.k_in
        coef_A = _matrix(packed, self.start, self.row, (self.r, self.k_in))
        return coef_A, _matrix(packed, middle, self.row + self.r, (self.r, self.k_out)).mT


def _matrix(packed: Packed, start: int, row: int, shape: tuple[int, int]) -> Float[Tensor, "m rows columns"]:
    """One matrix of each member: from value ``start`` and row ``row`` on."""
    rows, columns = shape
    codes = packed.codes[:, start : start + rows * columns].view(len(packed.codes), rows, columns)
    steps = None if packed.steps is None else packed.steps[:, row : row + rows, None]
    return Packed(codes=codes, steps=steps).unpacked()


class Layout:
    """Places of all layers that a member changes; members alike share one, and are unpacked together."""

    def __init__(self, ranks: Mapping[str, int], bases: Mapping[str, LayerBasis]) -> None:
        places, start, row = [], 0, 0
        for layer, r in ranks.items():
            k_in, k_out = len(bases[layer].V), int(bases[layer].U.shape[1])
            places.append(Place(layer=layer, r=r, k_in=k_in, k_out=k_out, start=start, row=row))
            start, row = start + r * (k_in + k_out), row + 2 * r
        self.places = {place.layer: place for place in places}
        self.values = start
        """Of all places together."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Private:
    """What the basis of a layer can't hold of a member: ``A' = coef_A @ V + A``, ``B' = U @ coef_B + B.T``."""

    A: Packed | None
    """``(r, d_in)``."""
    B: Packed | None
    """``(r, d_out)``."""

    @property
    def bytes(self) -> int:
        """In memory."""
        return sum(packed.bytes for packed in (self.A, self.B) if packed is not None)

    @property
    def values(self) -> int:
        """How many."""
        return sum(packed.codes.numel() for packed in (self.A, self.B) if packed is not None)


@dataclass(frozen=True, kw_only=True, eq=False)
class Member:
    """One adapter, ready to serve."""

    name: str
    layout: Layout
    coefficients: Packed
    """Of all layers, one after the other: a matrix of one column a value, with the steps of its rows."""
    private: Mapping[str, Private]
    """By layer; only where there is anything."""
    heads: Mapping[str, Tensor]
    """Tensors of its task head, by name."""

    @property
    def bytes(self) -> int:
        """In memory."""
        private = sum(part.bytes for part in self.private.values())
        return self.coefficients.bytes + private + sum(head.nbytes for head in self.heads.values())

    def factors(self, layer: str, basis: LayerBasis) -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"]]:
        """``A', B'`` at scale 1, in float32."""
        coef_A, coef_B = self.layout.places[layer].of(Packed.stacked([self.coefficients]))
        A, B, private = coef_A[0] @ basis.V, basis.U @ coef_B[0], self.private.get(layer)
        if private is not None:
            A = A if private.A is None else A + private.A.unpacked()
            B = B if private.B is None else B + private.B.unpacked().T
        return A, B


class Splitter:
    """Brings adapters into the coordinates of the layers' bases.

    Args:
        bases: By layer of the model.
        bits: Of a stored value.

    Raises:
        BankError: If ``bits`` is none of 8, 16 and 32.
    """

    def __init__(self, bases: Mapping[str, LayerBasis], bits: int) -> None:
        check_bits(bits)
        self.bases, self.bits = bases, bits
        self._layouts: dict[tuple[tuple[str, int], ...], Layout] = {}

    def split(self, adapter: LoraAdapter) -> Member:
        """An adapter as a member; modules may have other leading parts than the layers.

        Raises:
            BankError: If it has a module that there is no layer for, or of another size.
        """
        layers, where = match_modules(adapter.modules, self.bases), f"adapter {adapter.name!r}"
        ranks, rows, private = dict[str, int](), list[Packed](), dict[str, Private]()
        for module in adapter.modules:
            if module not in layers:
                raise BankError(f"{where}: the engine has no layer {module}; fit a bank that has it")
            factors, layer = adapter.factors(module), layers[module]
            basis = self.bases[layer]
            if (factors.d_in, factors.d_out) != (basis.V.shape[1], basis.U.shape[0]):
                raise BankError(
                    f"{where}, {module}: it is {factors.d_out} x {factors.d_in}, the layer {basis.U.shape[0]} x "
                    f"{basis.V.shape[1]}; is it of another base model?"
                )
            A, B = factors.A.float(), factors.B.float()
            coef_A, coef_B = A @ basis.V.T, basis.U.T @ B
            rest_A = self._rest(A, torch.addmm(A, coef_A, basis.V, alpha=-1), 1.0)
            # as B lies in memory: its transpose would take half as long again
            rest_B = self._rest(B.T, torch.addmm(B, basis.U, coef_B, alpha=-1).T, factors.scale)
            ranks[layer] = factors.rank
            rows += [Packed.of(coef_A, self.bits), Packed.of(factors.scale * coef_B.T, self.bits)]
            if rest_A is not None or rest_B is not None:
                private[layer] = Private(A=rest_A, B=rest_B)
        return Member(
            name=adapter.name,
            layout=self.layout(ranks),
            coefficients=Packed.joined(rows),
            private=private,
            heads={name: adapter.extra(name) for name in adapter.extra_names},
        )

    def layout(self, ranks: Mapping[str, int]) -> Layout:
        """Of members with these ranks by layer, the same for all that are alike."""
        return self._layouts.setdefault(tuple(ranks.items()), Layout(ranks, self.bases))

    def _rest(self, rows: Float[Tensor, "r d"], rest: Float[Tensor, "r d"], scale: float) -> Packed | None:
        """What is left of a factor's rows, times ``scale``; none if that is rounding."""
        return Packed.of(scale * rest, self.bits) if bool(rest.norm() > NOTHING * rows.norm()) else None


def directions(bank: Bank) -> int | None:
    """All that a layer stores or a task was trained on, if that is more than ``Bank.basis`` gives by itself."""
    counts = [max(pair) for pair in bank.directions().values()]
    counts += [entry.task.k or 0 for entry in bank.index.members.values() if entry.task is not None]
    return most if (most := max(counts, default=0)) > DEFAULT_K else None
