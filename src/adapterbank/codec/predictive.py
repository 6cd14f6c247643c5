"""Predictive coding of balanced factors: a shared basis predicts, private remainders correct, each at the length it
deserves.

An update is a sum of pairs ``s_j u_j v_j^T``. Per side the decoded basis predicts each vector by least squares; what
it leaves is a remainder. The output side is coded first; the input side is then refitted to what the output side
decodes to, so that its bits also mend the first side's error.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from adapterbank.codec.cost import SideEnergy, pair_cost
from adapterbank.codec.entropy import CLASS_LIMIT, Reader, Writer
from adapterbank.codec.tables import CLASS_ZERO, CLASSES_PER_OCTAVE, SLOPE
from adapterbank.errors import BankError
from adapterbank.subspace.updates import ThinUpdate

STEPS_PER_OCTAVE = 4
STEP_CODES = (-240, 500)
"""Steps from 2**60 down to 2**-125: beyond, float32 holds no factor."""
FINEST = 2.0**-20
"""Step against the root mean square of a balanced vector; finer is beyond float32's own rounding."""
MOST_PROFILE = 40


@dataclass(frozen=True, kw_only=True, eq=False)
class SideBasis:
    """Decoded shared directions of one side of one module; nearly orthonormal, as they went through the codec."""

    vectors: Float[Tensor, "k d"]
    profile: Int[np.ndarray, " k"]
    """How wide each direction's coefficients are against the mean of all, in classes."""

    @property
    def k(self) -> int:
        """Number of directions."""
        return int(self.vectors.shape[0])

    def project(self, rows: Float[Tensor, "m d"]) -> Float[Tensor, "m k"]:
        """Least-squares coefficients against the decoded, so slightly skew, directions."""
        return rows @ self._dual.T

    @cached_property
    def _dual(self) -> Float[Tensor, "k d"]:
        wide = self.vectors.double()
        # coarse codes can make directions alike, or nothing: the ridge gives such ones no coefficients of any size
        ridge = 1e-9 * torch.eye(self.k, dtype=wide.dtype)
        dual: Tensor = torch.linalg.solve(wide @ wide.T + ridge, wide).float() if self.k else self.vectors
        return dual


@dataclass(frozen=True, kw_only=True, eq=False)
class ModuleBasis:
    """Decoded shared directions of both sides of one module."""

    side_in: SideBasis
    side_out: SideBasis


@dataclass
class _Context:
    """What the previous vector of this payload looked like: metadata is coded as differences from it."""

    last: dict[str, int] = field(default_factory=dict)

    def write(self, writer: Writer, kind: str, value: int) -> None:
        writer.integer(value - self.last.get(kind, 0))
        self.last[kind] = value

    def read(self, reader: Reader, kind: str, least: int, most: int) -> int:
        value = reader.integer() + self.last.get(kind, 0)
        if not least <= value <= most:
            raise BankError(f"a payload is damaged: {kind} {value} is outside [{least}, {most}]")
        self.last[kind] = value
        return value

    def step(self, reader: Reader) -> int:
        return self.read(reader, "step", *STEP_CODES)

    def profile(self, reader: Reader) -> int:
        return self.read(reader, "profile", -MOST_PROFILE, MOST_PROFILE)

    def class_(self, reader: Reader, kind: str) -> int:
        return self.read(reader, kind, CLASS_ZERO, CLASS_LIMIT)


def to_class(width: Float[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
    """Nearest class of values this wide against their step; ``CLASS_ZERO`` where they aren't worth coding."""
    with np.errstate(divide="ignore"):
        classes = np.rint(CLASSES_PER_OCTAVE * np.log2(np.maximum(width, 1e-30)))
    clipped: np.ndarray = np.clip(classes, CLASS_ZERO, CLASS_LIMIT).astype(np.int64)
    return clipped


def step_code(step: Float[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
    """Steps on a grid of quarter octaves, as integers."""
    code: np.ndarray = np.rint(-STEPS_PER_OCTAVE * np.log2(step)).clip(*STEP_CODES).astype(np.int64)
    return code


def step_of(code: Int[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """The step a code stands for."""
    return 2.0 ** (-np.asarray(code) / STEPS_PER_OCTAVE)


# --- the shared basis -----------------------------------------------------------------------------------------------


def encode_side_basis(
    writer: Writer,
    directions: Float[Tensor, "k d"],
    weight: Float[np.ndarray, " k"],
    profile: Int[np.ndarray, " k"],
    slope: float,
) -> SideBasis:
    """Code unit directions, each as finely as its weight asks for, and return what a reader will see.

    Args:
        writer: Where the codes go.
        directions: Orthonormal rows.
        weight: What a unit of squared error in each direction costs.
        profile: See ``SideBasis.profile``.
        slope: Weighted squared error that one bit is worth.
    """
    k, d = directions.shape
    context = _Context()
    writer.integer(k)
    # 2**-20 of a unit vector is beyond float32's own rounding
    codes = np.clip(step_code(np.sqrt(slope / (SLOPE * np.maximum(weight, 1e-30)))), -8, 20 * STEPS_PER_OCTAVE)
    classes = np.maximum(to_class(np.sqrt(1 / d) / step_of(codes)), CLASS_ZERO + 1)
    for j in range(k):
        context.write(writer, "step", int(codes[j]))
        context.write(writer, "class", int(classes[j]))
        context.write(writer, "profile", int(profile[j]))
    step = step_of(codes)[:, None]
    decoded = writer.values(directions.numpy() / step, classes[:, None]) * step
    return SideBasis(vectors=torch.from_numpy(decoded.astype(np.float32)), profile=profile)


def decode_side_basis(reader: Reader, width: int) -> SideBasis:
    """Read what ``encode_side_basis`` wrote.

    Raises:
        BankError: If the bytes can't come from there.
    """
    context = _Context()
    k = reader.integer()
    if not 0 <= k <= width:
        raise BankError(f"a basis is damaged: {k} directions of {width} features")
    rows = [(context.step(reader), context.class_(reader, "class"), context.profile(reader)) for _ in range(k)]
    codes, classes, profile = np.array(rows, dtype=np.int64).reshape(k, 3).T
    decoded = reader.values(classes[:, None], width) * step_of(codes)[:, None]
    return SideBasis(vectors=torch.from_numpy(decoded.astype(np.float32)), profile=profile)


def coefficient_profile(energy: Float[np.ndarray, " k"]) -> Int[np.ndarray, " k"]:
    """Classes of each direction's coefficients against the mean of all, from the energy each direction carries."""
    if energy.size == 0:
        return np.zeros(0, dtype=np.int64)
    share = energy / max(energy.mean(), 1e-30)
    classes = np.rint(CLASSES_PER_OCTAVE / 2 * np.log2(np.maximum(share, 1e-9)))
    profile: np.ndarray = np.clip(classes, -MOST_PROFILE, MOST_PROFILE).astype(np.int64)
    return profile


# --- one module of one adapter --------------------------------------------------------------------------------------


class ModuleWriter:
    """Codes the modules of one adapter in order."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._context = _Context()

    def encode(
        self, update: ThinUpdate, basis: ModuleBasis, weight: float, slope: float
    ) -> tuple[Float[Tensor, "p d_in"], Float[Tensor, "d_out p"]]:
        """Code one update and return the balanced factors ``A', B'`` a reader will see, ``p`` pairs.

        Args:
            update: The update's thin SVD.
            basis: Decoded basis of the module.
            weight: What a unit of squared error of the update costs.
            slope: Weighted squared error that one bit is worth.
        """
        keep, step = _plan(update, basis, weight, slope)
        self._context.write(self._writer, "pairs", int(keep.sum()))
        if not keep.any():
            return update.Vh.new_zeros(0, update.Vh.shape[1]), update.U.new_zeros(update.U.shape[0], 0)
        codes = step_code(step[keep])
        for code in codes:
            self._context.write(self._writer, "step", int(code))
        root = update.S.sqrt()
        rows_in, rows_out = root[:, None] * update.Vh, (update.U * root).T
        kept = torch.from_numpy(keep)
        decoded_out = self._side("out", rows_out[kept], basis.side_out, codes)
        decoded_in = self._side("in", _refit(rows_in, rows_out, decoded_out), basis.side_in, codes)
        return decoded_in, decoded_out.T

    def _side(
        self, name: str, rows: Float[Tensor, "p d"], basis: SideBasis, codes: Int[np.ndarray, " p"]
    ) -> Float[Tensor, "p d"]:
        step = step_of(codes)[:, None]
        predicted = self._predict(name, rows, basis, step)
        remainder = (rows - predicted).numpy()
        classes = to_class(np.sqrt((remainder**2).mean(axis=1)) / step[:, 0])
        for value in classes:
            self._context.write(self._writer, f"{name} remainder", int(value))
        private = self._writer.values(remainder / step, classes[:, None]) * step
        return predicted + torch.from_numpy(private.astype(np.float32))

    def _predict(
        self, name: str, rows: Float[Tensor, "p d"], basis: SideBasis, step: Float[np.ndarray, "p 1"]
    ) -> Float[Tensor, "p d"]:
        if basis.k == 0:
            return torch.zeros_like(rows)
        coefficients = basis.project(rows).numpy()
        level = to_class(np.sqrt((coefficients**2).mean(axis=1)) / step[:, 0])
        for value in level:
            self._context.write(self._writer, f"{name} level", int(value))
        decoded = self._writer.values(coefficients / step, _coefficient_classes(level, basis)) * step
        return torch.from_numpy(decoded.astype(np.float32)) @ basis.vectors


class ModuleReader:
    """Reads what a ``ModuleWriter`` wrote."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._context = _Context()

    def decode(self, basis: ModuleBasis, rank: int) -> tuple[Float[Tensor, "p d_in"], Float[Tensor, "d_out p"]]:
        """The balanced factors ``A', B'`` of the next module, scale 1.

        Args:
            basis: Decoded basis of the module.
            rank: Rank of the update: the most pairs there can be.

        Raises:
            BankError: If the bytes can't come from a ``ModuleWriter``.
        """
        d_in, d_out = basis.side_in.vectors.shape[1], basis.side_out.vectors.shape[1]
        pairs = self._context.read(self._reader, "pairs", 0, min(rank, d_in, d_out))
        if pairs == 0:
            return torch.zeros(0, d_in), torch.zeros(d_out, 0)
        codes = np.array([self._context.step(self._reader) for _ in range(pairs)], dtype=np.int64)
        decoded_out = self._side("out", basis.side_out, codes)
        return self._side("in", basis.side_in, codes), decoded_out.T

    def _side(self, name: str, basis: SideBasis, codes: Int[np.ndarray, " p"]) -> Float[Tensor, "p d"]:
        step = step_of(codes)[:, None]
        predicted = self._predict(name, basis, step)
        widths = np.array([self._context.class_(self._reader, f"{name} remainder") for _ in codes], dtype=np.int64)
        private = self._reader.values(widths[:, None], basis.vectors.shape[1]) * step
        return predicted + torch.from_numpy(private.astype(np.float32))

    def _predict(self, name: str, basis: SideBasis, step: Float[np.ndarray, "p 1"]) -> Float[Tensor, "p d"]:
        if basis.k == 0:
            return torch.zeros(len(step), basis.vectors.shape[1])
        level = np.array([self._context.class_(self._reader, f"{name} level") for _ in step], dtype=np.int64)
        decoded = self._reader.values(_coefficient_classes(level, basis), basis.k) * step
        return torch.from_numpy(decoded.astype(np.float32)) @ basis.vectors


def _coefficient_classes(level: Int[np.ndarray, " p"], basis: SideBasis) -> Int[np.ndarray, "p k"]:
    classes: np.ndarray = np.clip(level[:, None] + basis.profile[None, :], CLASS_ZERO, CLASS_LIMIT)
    return classes


def _plan(
    update: ThinUpdate, basis: ModuleBasis, weight: float, slope: float
) -> tuple[np.ndarray, Float[np.ndarray, " r"]]:
    """Which pairs to keep and the step of each, from their energies in the decoded basis."""
    S = update.S.double().numpy()
    pair_weight = weight * S**2
    if not pair_weight.any():
        return np.zeros(S.shape, dtype=bool), np.ones_like(S)
    cost = pair_cost(pair_weight, _energies(update.Vh, basis.side_in), _energies(update.U.T, basis.side_out), slope)
    # an error in a balanced vector of energy s costs s, less what the other side loses anyway
    survives = 1 - sum(cost.side_error) / 2
    step = np.sqrt(slope / (SLOPE * weight * np.maximum(S * survives, 1e-30)))
    return cost.keep, np.maximum(step, FINEST * np.sqrt(S / max(update.U.shape[0], update.Vh.shape[1])))


def _energies(rows: Float[Tensor, "r d"], basis: SideBasis) -> SideEnergy:
    coefficients = basis.project(rows)
    left = (rows - coefficients @ basis.vectors).double().square().sum(dim=1).numpy()
    explained = coefficients.double().square().numpy()
    energy = np.concatenate([explained, left[:, None]], axis=1)
    size = np.concatenate([np.ones(basis.k), [rows.shape[1]]])
    return SideEnergy(energy=energy, size=np.broadcast_to(size, energy.shape))


def _refit(
    rows_in: Float[Tensor, "r d_in"], rows_out: Float[Tensor, "r d_out"], decoded_out: Float[Tensor, "p d_out"]
) -> Float[Tensor, "p d_in"]:
    """The input rows that fit the update best, given the output rows as decoded: least squares, a p x p system."""
    decoded, rows = decoded_out.double(), rows_out.double()
    gram = decoded @ decoded.T
    # a decoded row may be zero; a trace of ridge keeps its partner at zero instead of infinity
    ridge = 1e-12 * gram.diagonal().mean().clamp_min(1e-30) * torch.eye(gram.shape[0], dtype=gram.dtype)
    refitted: Tensor = torch.linalg.solve(gram + ridge, decoded @ rows.T) @ rows_in.double()
    return refitted.float()
