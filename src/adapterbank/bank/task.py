"""Tasks that were trained in the bank: what update their weights are, and members that hold nothing but coefficients.

An ordinary member approximates an adapter in the coordinates of its layers. A task that is nothing but coefficients on
a basis that the bank can derive needs only those: in 32 bits, where they come back to the bit, or coded as an update
of a layer that is no wider than the basis. The basis is orthonormal, so the error is the same in both coordinates.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from adapterbank.adapters import LoraAdapter, LoraFactors
from adapterbank.bank.coding import Pair, Slot, decode_predictive, pack, read_slots, unpack, write_slots
from adapterbank.bank.index import BankIndex, MemberEntry, ModuleEntry, TaskEntry
from adapterbank.bank.shared_basis import BankBasis, SharedBasis
from adapterbank.codec.entropy import Reader, Writer
from adapterbank.codec.plain import PlainReader, PlainWriter
from adapterbank.codec.predictive import ModuleBasis, SideBasis
from adapterbank.codec.rows import unpack_rows
from adapterbank.errors import BankError
from adapterbank.subspace.updates import ThinUpdate, thin_svd

# --- the update -------------------------------------------------------------------------------------------------------


def task_factors(
    weights: Mapping[str, Tensor],
    V: Float[Tensor, "rows w_in"],
    U: Float[Tensor, "w_out columns"],
    *,
    k: tuple[int, int],
    sizes: tuple[int, int],
    scale: float = 1.0,
    bits: int = 4,
) -> Pair:
    """``A' = coef_A @ V`` and ``B' = scale * U @ coef_B`` of one layer, and what the task has beside the coefficients.

    Args:
        weights: Weights of the layer by name; gradients flow to them.
        V: ``k_in`` rows, and the mean row of a centred basis after them.
        U: ``k_out`` columns, and the mean column after them.
        k: ``(k_in, k_out)``.
        sizes: ``(d_in, d_out)``; in flat banks a direction is as wide as a whole factor.
        scale: Of the update.
        bits: Of a value of packed gradient directions.
    """
    (k_in, k_out), (d_in, d_out) = k, sizes
    if "eig_core" in weights:
        A, B = V, U @ (scale * weights["eig_core"])  # (k_in, d_in), (d_out, k_in)
    else:
        # the scale on the coefficients: B' is far larger
        coef_A, coef_B = weights["eig_coef_A"], scale * weights["eig_coef_B"]
        A = coef_A[:, :k_in] @ V[:k_in]  # (r, d_in); (1, r * d_in) in flat banks
        B = U[:, :k_out] @ coef_B[:k_out]  # (d_out, r)
        if len(V) > k_in:  # the mean row of a centred basis
            A, B = A + V[k_in], B + scale * U[:, k_out:]
        if "eig_gradient_in" in weights:
            A = A + coef_A[:, k_in:] @ unpack_rows(weights["eig_gradient_in"], d_in, bits).to(A)
            B = B + unpack_rows(weights["eig_gradient_out"], d_out, bits).to(B).T @ coef_B[k_out:]
        if V.shape[1] > d_in:
            A, B = A.reshape(-1, d_in), B.T.reshape(-1, d_out).T
    if "eig_free_A" in weights:
        A = torch.cat([A, weights["eig_free_A"]])
        B = torch.cat([B, scale * weights["eig_free_B"]], dim=1)
    return A, B


# --- as a member ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskCoefficients:
    """All that a task is, beside its head: weights on a basis that the bank can derive."""

    entry: TaskEntry
    scale: float
    rank: Mapping[str, int]
    """Rank of the update of each module, by its name in the bank."""
    weights: Mapping[str, Mapping[str, Tensor]]


def encode_task(task: TaskCoefficients, modules: Sequence[ModuleEntry]) -> Tensor:
    """Payload of a task: its table, and 4 bytes for every coefficient."""
    writer, body = Writer(), PlainWriter(32)
    write_slots(writer, [Slot(rank=task.rank.get(module.name, 0), scale=0) for module in modules])
    for module in modules:
        for name in _names(task.entry) if module.name in task.weights else ():
            body.matrix(task.weights[module.name][name])
    return pack(writer.finish(), body.finish())


def coordinates(task: TaskCoefficients, modules: Sequence[ModuleEntry]) -> Iterator[tuple[ThinUpdate, ModuleBasis]]:
    """What the predictive coder takes: each update in coordinates of the task's basis, where nothing predicts it."""
    for module in modules:
        if module.name not in task.weights:
            continue
        a, b = (task.weights[module.name].get(name) for name in ("eig_coef_A", "eig_coef_B"))
        if a is None or b is None:
            core = task.weights[module.name]["eig_core"]
            a, b = torch.eye(core.shape[1]), core
        k_in, k_out = int(a.shape[1]), int(b.shape[0])
        if k_in and k_out:
            update = thin_svd(a, b, task.scale)
        else:  # a layer that no member changed has no directions
            update = ThinUpdate(U=torch.zeros(k_out, 0), S=torch.zeros(0), Vh=torch.zeros(0, k_in))
        yield update, _unpredicted(k_in, k_out)


def restore_task(index: BankIndex, basis: BankBasis, name: str, tensors: Mapping[str, Tensor]) -> LoraAdapter:
    """A task as an ordinary adapter of scale 1, its coefficients multiplied out.

    Args:
        index: The bank's index, which has the member.
        basis: The basis that it was trained on, its random directions among them.
        name: Name of the member.
        tensors: Content of its file.

    Raises:
        BankError: If the file is damaged, or this is another basis.
    """
    entry, where = index.members[name], f"member {name!r}"
    task = entry.task
    if task is None or len(entry.scales) != 1:
        raise BankError(f"{where} is damaged: a task has one scale, not {len(entry.scales)}; restore it from a copy")
    basis.check(task.fingerprint, task.probe, where)
    read = _coded_factors if task.coded else _kept_factors
    try:
        pairs = read(tensors["payload"], entry, task, index.modules, basis)
    except BankError as error:
        raise BankError(f"{where}: {error}") from error
    factors = {}
    for module, (A, B) in pairs.items():
        if not (A.isfinite().all() and B.isfinite().all()):
            raise BankError(f"{where}, {module}: it holds values that are not finite; restore it from a copy")
        factors[module] = LoraFactors(A=A, B=B, scale=1.0)
    extras = {key.removeprefix("extra."): value for key, value in tensors.items() if key.startswith("extra.")}
    return LoraAdapter.from_factors(name, factors, base=index.base, config=index.configs[entry.config], extras=extras)


def _kept_factors(
    payload: Tensor, entry: MemberEntry, task: TaskEntry, modules: Sequence[ModuleEntry], basis: BankBasis
) -> dict[str, Pair]:
    table, data = unpack(payload)
    slots = read_slots(Reader(table), modules, entry.values)
    present = _present(slots, modules)
    shapes = [_shapes(task, rank, basis.modules[module.name], module.name) for module, rank in present]
    expected = sum(4 * rows * cols for pair in shapes for rows, cols in pair)
    if expected != data.size:
        raise BankError(
            f"it is damaged: its coefficients take {data.size} bytes, its table says {expected}; restore it from a copy"
        )
    body, found = PlainReader(data, 32), {}
    for (module, _), pair in zip(present, shapes, strict=True):
        weights = {key: body.matrix(*shape) for key, shape in zip(_names(task), pair, strict=True)}
        part, sizes = basis.modules[module.name], (module.d_in, module.d_out)
        found[module.name] = task_factors(weights, part.V, part.U, k=part.k, sizes=sizes, scale=entry.scales[0])
    return found


def _coded_factors(
    payload: Tensor, entry: MemberEntry, _task: TaskEntry, modules: Sequence[ModuleEntry], basis: BankBasis
) -> dict[str, Pair]:
    bases = [_unpredicted(*basis.modules[module.name].k) for module in modules]
    slots, pairs = decode_predictive(payload, bases, modules, entry.values)
    found = {}
    for (module, rank), (a, b) in zip(_present(slots, modules), pairs, strict=True):
        part, missing = basis.modules[module.name], rank - len(a)
        # pairs that were not worth their bytes come back as zeros, so that shapes stay
        found[module.name] = pad(a @ part.V, (0, 0, 0, missing)), pad(part.U @ b, (0, missing))
    return found


def _present(slots: Sequence[Slot], modules: Sequence[ModuleEntry]) -> list[tuple[ModuleEntry, int]]:
    """The modules that a task has, and their ranks."""
    if any(slot.scale for slot in slots):
        raise BankError("it is damaged: its table has a second scale, a task has one; restore it from a copy")
    return [(module, slot.rank) for module, slot in zip(modules, slots, strict=True) if slot.rank]


def _unpredicted(k_in: int, k_out: int) -> ModuleBasis:
    """A module without shared directions, in coordinates of a task's basis."""
    none = np.zeros(0, dtype=np.int64)
    return ModuleBasis(
        side_in=SideBasis(vectors=torch.zeros(0, k_in), profile=none),
        side_out=SideBasis(vectors=torch.zeros(0, k_out), profile=none),
    )


def _names(task: TaskEntry) -> tuple[str, ...]:
    return ("eig_core",) if task.core else ("eig_coef_A", "eig_coef_B")


def _shapes(task: TaskEntry, rank: int, basis: SharedBasis, module: str) -> list[tuple[int, int]]:
    """Shapes of the stored matrices of one module, in the order of ``_names``."""
    k_in, k_out = basis.k
    if rank % basis.fold or (task.core and rank != k_in):
        raise BankError(f"{module}: it is damaged: rank {rank} on {k_in} directions of {basis.fold} rows")
    rows = rank // basis.fold
    return [(k_out, k_in)] if task.core else [(rows, k_in), (k_out, rows)]
