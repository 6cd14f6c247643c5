"""Tasks that were trained in the bank: what update their weights are, and members that keep the weights as they are.

An ordinary member approximates an adapter at a price in bytes. A task that is nothing but coefficients on the bank's
own basis is that small already: its float32 coefficients are stored, and come back to the bit.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from adapterbank.adapters import LoraAdapter, LoraFactors
from adapterbank.bank.coding import Pair, Slot, pack, read_slots, unpack, write_slots
from adapterbank.bank.index import BankIndex, ModuleEntry, TaskEntry
from adapterbank.bank.shared_basis import BankBasis, SharedBasis
from adapterbank.codec.entropy import Reader, Writer
from adapterbank.codec.plain import PlainReader, PlainWriter
from adapterbank.codec.rows import unpack_rows
from adapterbank.errors import BankError
from adapterbank.subspace.completion import random_directions

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
    """
    # of the module's name too: equal directions in all layers would be no random ones
    drawn = zlib.crc32(f"{seed} {module}".encode())
    return (
        torch.cat([V, random_directions(count, V.shape[1], V, seed=drawn)]),
        torch.cat([U, random_directions(count, U.shape[0], U.T, seed=drawn + 1).T], dim=1),
    )


# --- as a member ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskCoefficients:
    """All that a task is, beside its head: weights on the bank's own basis."""

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


def restore_task(index: BankIndex, basis: BankBasis, name: str, tensors: Mapping[str, Tensor]) -> LoraAdapter:
    """A task as an ordinary adapter of scale 1, its coefficients multiplied out.

    Args:
        index: The bank's index, which has the member.
        basis: The basis that it was trained on.
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
    table, data = unpack(tensors["payload"])
    try:
        slots = read_slots(Reader(table), index.modules, entry.values)
    except BankError as error:
        raise BankError(f"{where}: {error}") from error
    if any(slot.scale for slot in slots):
        raise BankError(f"{where} is damaged: its table has a second scale, a task has one; restore it from a copy")
    present = [(m, s.rank, basis.modules[m.name]) for m, s in zip(index.modules, slots, strict=True) if s.rank]
    shapes = [_shapes(task, rank, of, f"{where}, {module.name}") for module, rank, of in present]
    expected = sum(4 * rows * cols for pair in shapes for rows, cols in pair)
    if expected != data.size:
        raise BankError(
            f"{where} is damaged: its coefficients take {data.size} bytes, its table says {expected}; restore it "
            "from a copy"
        )
    body, factors = PlainReader(data, 32), {}
    for (module, _, of), pair in zip(present, shapes, strict=True):
        weights = {key: body.matrix(*shape) for key, shape in zip(_names(task), pair, strict=True)}
        sizes = module.d_in, module.d_out
        A, B = task_factors(weights, of.V, of.U, k=of.k, sizes=sizes, scale=entry.scales[0])
        if not (A.isfinite().all() and B.isfinite().all()):
            raise BankError(f"{where}, {module.name}: it holds values that are not finite; restore it from a copy")
        factors[module.name] = LoraFactors(A=A, B=B, scale=1.0)
    extras = {key.removeprefix("extra."): value for key, value in tensors.items() if key.startswith("extra.")}
    return LoraAdapter.from_factors(name, factors, base=index.base, config=index.configs[entry.config], extras=extras)


def _names(task: TaskEntry) -> tuple[str, ...]:
    return ("eig_core",) if task.core else ("eig_coef_A", "eig_coef_B")


def _shapes(task: TaskEntry, rank: int, basis: SharedBasis, where: str) -> list[tuple[int, int]]:
    """Shapes of the stored matrices of one module, in the order of ``_names``."""
    k_in, k_out = basis.k
    if rank % basis.fold or (task.core and rank != k_in):
        raise BankError(f"{where}: it is damaged: rank {rank} on {k_in} directions of {basis.fold} rows")
    rows = rank // basis.fold
    return [(k_out, k_in)] if task.core else [(rows, k_in), (k_out, rows)]
