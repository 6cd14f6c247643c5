"""Bases and members to payloads and back, in either coding; ``docs/format.md`` spells the bytes out.

A payload is ``table length (u32) | table | body``. The table says which modules a member has, at which rank and
scale; in the predictive coding it is part of the one entropy-coded stream, so the body is empty.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from adapterbank.bank.index import ModuleEntry
from adapterbank.codec.entropy import Reader, Writer
from adapterbank.codec.plain import PlainReader, PlainWriter
from adapterbank.codec.predictive import ModuleBasis, ModuleReader, ModuleWriter, decode_side_basis
from adapterbank.errors import BankError
from adapterbank.subspace.product import harmonic_size
from adapterbank.subspace.updates import ThinUpdate, difference_norm

Pair = tuple[Float[Tensor, "p d_in"], Float[Tensor, "d_out p"]]
"""Factors ``A', B'`` of one module at scale 1."""
LARGEST_RANK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Rank and scale of one module of one member; rank 0: the member lacks the module."""

    rank: int
    scale: int
    """Index into the member's distinct scales."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PlainSide:
    """Shared rows of one side of one module, as they are; without any, members keep a factor's rows themselves."""

    rows: Float[Tensor, "k width"]
    mean: Float[Tensor, " width"] | None
    fold: int
    """Rows of a factor that one row of ``rows`` covers: 1, or the rank in flat banks."""

    @property
    def k(self) -> int:
        """Number of shared rows."""
        return int(self.rows.shape[0])

    @property
    def columns(self) -> int:
        """Values that a member stores of each row."""
        return self.k or int(self.rows.shape[1])

    def project(self, rows: Float[Tensor, "r d"]) -> Float[Tensor, "m columns"]:
        """Coefficients of a factor's rows; the shared rows are orthonormal up to rounding."""
        self.check(len(rows))
        flat = rows.reshape(-1, self.rows.shape[1])
        if self.k == 0:
            return flat
        return (flat if self.mean is None else flat - self.mean) @ self.rows.T

    def check(self, rank: int) -> None:
        """Refuse a rank that whole rows can't make.

        Raises:
            BankError: If the rank is no multiple of ``fold``.
        """
        if rank % self.fold:
            raise BankError(f"a flat bank of rank {self.fold} can't hold a module of rank {rank}; fit by product")

    def reconstruct(self, coefficients: Float[Tensor, "m columns"]) -> Float[Tensor, "r d"]:
        """A factor's rows."""
        if self.k == 0:
            return coefficients
        flat = coefficients @ self.rows
        return (flat if self.mean is None else flat + self.mean).reshape(len(flat) * self.fold, -1)


@dataclass(frozen=True, kw_only=True, eq=False)
class PlainBasis:
    """Both sides of one module."""

    side_in: PlainSide
    side_out: PlainSide


def pack(table: np.ndarray, body: np.ndarray) -> Tensor:
    """Join table and body into the payload tensor."""
    length = np.array([table.nbytes], dtype="<u4").view(np.uint8)
    return torch.from_numpy(np.concatenate([length, table, body]))


def unpack(payload: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Table and body of a payload.

    Raises:
        BankError: If the payload is too short for its table.
    """
    data = payload.numpy() if payload.dtype == torch.uint8 else np.zeros(0, dtype=np.uint8)
    whole = payload.dtype == torch.uint8 and payload.ndim == 1 and data.size >= 4
    length = int(data[:4].copy().view("<u4")[0]) if whole else -1
    if not 0 <= length <= data.size - 4:
        raise BankError(f"a payload of {data.size} bytes is damaged: its table would take {length}")
    return data[4 : 4 + length].copy(), data[4 + length :]


# --- members --------------------------------------------------------------------------------------------------------


def write_slots(writer: Writer, slots: Sequence[Slot]) -> None:
    """Code a member's table as differences from slot to slot."""
    last = Slot(rank=0, scale=0)
    for slot in slots:
        writer.integer(slot.rank - last.rank)
        if slot.rank:
            writer.integer(slot.scale - last.scale)
        last = Slot(rank=slot.rank, scale=slot.scale if slot.rank else last.scale)


def read_slots(reader: Reader, modules: Sequence[ModuleEntry], values: int) -> list[Slot]:
    """Read a member's table.

    Args:
        reader: Where it is.
        modules: The bank's modules.
        values: Values of all A and B according to the index; a table that says otherwise would allocate otherwise.

    Raises:
        BankError: If a rank or scale is impossible.
    """
    slots, rank, scale = [], 0, 0
    for _ in modules:
        rank += reader.integer()
        if rank:
            scale += reader.integer()
        if not 0 <= rank <= LARGEST_RANK or scale < 0:
            raise BankError(f"a payload is damaged: rank {rank}, scale {scale}")
        slots.append(Slot(rank=rank, scale=scale))
    found = sum(slot.rank * (m.d_in + m.d_out) for slot, m in zip(slots, modules, strict=True))
    if found != values:
        raise BankError(f"a payload is damaged: its table is one of {found} values, the index says {values}")
    return slots


def encode_predictive(
    slots: Sequence[Slot],
    updates: Iterable[tuple[ThinUpdate, ModuleBasis]],
    weight: float,
    slope: float,
) -> tuple[Tensor, float]:
    """Code one member; returns its payload and its weighted squared error, relative to 1.

    Args:
        slots: Its table, one slot per module of the bank.
        updates: Update and basis of each module that the member has, in the bank's order.
        weight: 1 over the squared norm of the whole update.
        slope: Weighted squared error that one bit is worth.
    """
    writer = Writer()
    write_slots(writer, slots)
    modules = ModuleWriter(writer)
    error = 0.0
    for update, basis in updates:
        A, B = modules.encode(update, basis, weight, slope)
        error += weight * difference_norm(update, A, B) ** 2
    return pack(writer.finish(), np.zeros(0, dtype=np.uint8)), error


def decode_predictive(
    payload: Tensor, bases: Sequence[ModuleBasis], modules: Sequence[ModuleEntry], values: int
) -> tuple[list[Slot], list[Pair]]:
    """Table and factors of a member; factors only of the modules that it has."""
    reader = Reader(unpack(payload)[0])
    slots = read_slots(reader, modules, values)
    body = ModuleReader(reader)
    return slots, [body.decode(basis, slot.rank) for slot, basis in zip(slots, bases, strict=True) if slot.rank]


def encode_plain(
    slots: Sequence[Slot], updates: Iterable[tuple[ThinUpdate, Pair, PlainBasis]], weight: float, bits: int
) -> tuple[Tensor, float]:
    """Code one member as plain coefficients; returns its payload and its weighted squared error.

    Args:
        slots: Its table.
        updates: Update, factors at scale 1 and basis of each module that the member has.
        weight: 1 over the squared norm of the whole update.
        bits: 16 or 32.
    """
    writer, body = Writer(), PlainWriter(bits)
    write_slots(writer, slots)
    error = 0.0
    for update, (A, B), basis in updates:
        coef_in, coef_out = basis.side_in.project(A), basis.side_out.project(B.T)
        if _is_core(basis, len(A)):
            pair = _from_core(body.matrix(coef_out.T @ coef_in), basis, len(A))
        else:
            decoded_in = basis.side_in.reconstruct(body.matrix(coef_in))
            pair = decoded_in, basis.side_out.reconstruct(body.matrix(coef_out)).T
        error += weight * difference_norm(update, *pair) ** 2
    return pack(writer.finish(), body.finish()), error


def decode_plain(
    payload: Tensor, bases: Sequence[PlainBasis], modules: Sequence[ModuleEntry], values: int, bits: int
) -> tuple[list[Slot], list[Pair]]:
    """Table and factors of a member; factors only of the modules that it has."""
    table, data = unpack(payload)
    slots, body = read_slots(Reader(table), modules, values), PlainReader(data, bits)
    pairs: list[Pair] = []
    for slot, basis in zip(slots, bases, strict=True):
        if slot.rank == 0:
            continue
        side_in, side_out = basis.side_in, basis.side_out
        side_in.check(slot.rank)
        side_out.check(slot.rank)
        if _is_core(basis, slot.rank):
            pairs.append(_from_core(body.matrix(side_out.k, side_in.k), basis, slot.rank))
            continue
        decoded_in = side_in.reconstruct(body.matrix(slot.rank // side_in.fold, side_in.columns))
        pairs.append((decoded_in, side_out.reconstruct(body.matrix(slot.rank // side_out.fold, side_out.columns)).T))
    return slots, pairs


def is_core(k_in: int, k_out: int, rank: int) -> bool:
    """Whether one dense core is smaller than a pair of coefficients."""
    return bool(k_in and k_out) and rank > harmonic_size(k_in, k_out)


def _is_core(basis: PlainBasis, rank: int) -> bool:
    # only uncentred bases of rows multiply out
    plain = basis.side_in.mean is None and basis.side_in.fold == 1
    return plain and is_core(basis.side_in.k, basis.side_out.k, rank)


def _from_core(core: Float[Tensor, "k_out k_in"], basis: PlainBasis, rank: int) -> Pair:
    # the core of an update of rank r has rank r, so nothing but rounding is cut here
    U, S, Vh = torch.linalg.svd(core.double(), full_matrices=False)
    root = S[:rank].sqrt()
    left, right = (U[:, :rank] * root).float(), (root[:, None] * Vh[:rank]).float()
    return right @ basis.side_in.rows, basis.side_out.rows.T @ left


# --- bases ----------------------------------------------------------------------------------------------------------


def decode_predictive_bases(payload: Tensor, modules: Sequence[ModuleEntry]) -> list[ModuleBasis]:
    """The decoded bases of a predictive bank."""
    reader = Reader(unpack(payload)[0])
    return [
        ModuleBasis(side_in=decode_side_basis(reader, m.d_in), side_out=decode_side_basis(reader, m.d_out))
        for m in modules
    ]


def encode_plain_bases(bases: Sequence[PlainBasis], bits: int) -> tuple[Tensor, list[PlainBasis]]:
    """Payload of the bases of a plain bank, and the bases as a reader will see them."""
    writer, body, decoded = Writer(), PlainWriter(bits), []
    for basis in bases:
        sides = []
        for side in (basis.side_in, basis.side_out):
            for value in (side.k, side.fold, int(side.mean is not None)):
                writer.integer(value)
            rows = body.matrix(side.rows)
            mean = None if side.mean is None else body.matrix(side.mean[None])[0]
            sides.append(PlainSide(rows=rows, mean=mean, fold=side.fold))
        decoded.append(PlainBasis(side_in=sides[0], side_out=sides[1]))
    return pack(writer.finish(), body.finish()), decoded


def decode_plain_bases(payload: Tensor, modules: Sequence[ModuleEntry], bits: int) -> list[PlainBasis]:
    """The bases of a plain bank."""
    table, data = unpack(payload)
    reader, body = Reader(table), PlainReader(data, bits)
    bases = []
    for module in modules:
        sides = []
        for d in (module.d_in, module.d_out):
            k, fold, centred = (reader.integer() for _ in range(3))
            if k < 0 or not 1 <= fold <= LARGEST_RANK or centred not in (0, 1):
                raise BankError(f"the basis of {module.name} is damaged: k={k}, fold={fold}")
            rows = body.matrix(k, fold * d)
            sides.append(PlainSide(rows=rows, mean=body.matrix(1, fold * d)[0] if centred else None, fold=fold))
        bases.append(PlainBasis(side_in=sides[0], side_out=sides[1]))
    return bases
