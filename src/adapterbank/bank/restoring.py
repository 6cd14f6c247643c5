"""Members back to adapters: from an index, decoded bases and the tensors of a file."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adapterbank.adapters import LoraAdapter, LoraFactors
from adapterbank.bank.coding import (
    Pair,
    PlainBasis,
    Slot,
    decode_plain,
    decode_plain_bases,
    decode_predictive,
    decode_predictive_bases,
)
from adapterbank.bank.index import BankIndex
from adapterbank.codec.predictive import ModuleBasis
from adapterbank.errors import BankError
from adapterbank.subspace.updates import difference_norm, thin_svd

Basis = ModuleBasis | PlainBasis


def decode_bases(index: BankIndex, payload: Tensor) -> Sequence[Basis]:
    """Decoded bases of all modules, in the order of the index."""
    if index.coding == "predictive":
        return decode_predictive_bases(payload, index.modules)
    return decode_plain_bases(payload, index.modules, index.plain_bits)


def restore(index: BankIndex, bases: Sequence[Basis], name: str, tensors: Mapping[str, Tensor]) -> LoraAdapter:
    """A member as an adapter in memory, with the modules, ranks, scales and task head it came with.

    Args:
        index: The bank's index, which has the member.
        bases: Decoded bases.
        name: Name of the member.
        tensors: Content of its file.

    Raises:
        BankError: If the file is damaged.
    """
    entry = index.members[name]
    slots, pairs = _decode(index, bases, name, tensors["payload"])
    present = [(m, s) for m, s in zip(index.modules, slots, strict=True) if s.rank]
    factors = {
        module.name: _factors(pair, slot, entry.scales, name)
        for (module, slot), pair in zip(present, pairs, strict=True)
    }
    extras = {key.removeprefix("extra."): value for key, value in tensors.items() if key.startswith("extra.")}
    config = index.configs[entry.config] if entry.config < len(index.configs) else {}
    return LoraAdapter.from_factors(name, factors, base=index.base, config=config, extras=extras)


def _decode(index: BankIndex, bases: Any, name: str, payload: Tensor) -> tuple[list[Slot], list[Pair]]:
    values = index.members[name].values
    try:
        if index.coding == "predictive":
            return decode_predictive(payload, bases, index.modules, values)
        return decode_plain(payload, bases, index.modules, values, index.plain_bits)
    except BankError as error:
        raise BankError(f"member {name!r}: {error}") from error


def _factors(pair: Pair, slot: Slot, scales: tuple[float, ...], member: str) -> LoraFactors:
    A, B = pair
    if len(A) > slot.rank or slot.scale >= len(scales):
        raise BankError(f"member {member!r} is damaged: {len(A)} pairs at rank {slot.rank}, scale {slot.scale}")
    if not (A.isfinite().all() and B.isfinite().all()):
        raise BankError(f"member {member!r} is damaged: it holds values that are not finite")
    scale = scales[slot.scale]
    # pairs that were not worth their bytes come back as zeros, so that shapes and keys stay
    missing = slot.rank - len(A)
    A = torch.nn.functional.pad(A, (0, 0, 0, missing))
    B = torch.nn.functional.pad(B, (0, missing))
    return LoraFactors(A=A, B=B / scale if scale else torch.zeros_like(B), scale=scale)


def relative_error(original: LoraAdapter, restored: LoraAdapter) -> float:
    """``||dW - dW'||_F / ||dW||_F`` over all modules.

    Raises:
        BankError: If the two have other modules, ranks or task heads.
    """
    if dict(original.modules) != dict(restored.modules):
        raise BankError(f"member {restored.name!r} has other modules or ranks than {original.name!r} as given")
    for extra in original.extra_names:
        if extra not in restored.extra_names or not torch.equal(original.extra(extra), restored.extra(extra)):
            raise BankError(
                f"member {restored.name!r} has another {extra} than the adapter given as {original.name!r}; "
                "is it the right original?"
            )
    energy = lost = 0.0
    for module in original.modules:
        mine, theirs = original.factors(module), restored.factors(module)
        update = thin_svd(mine.A, mine.B, mine.scale)
        energy += float(update.S.double().square().sum())
        lost += difference_norm(update, theirs.A, theirs.B * theirs.scale) ** 2
    return float((lost / energy) ** 0.5) if energy else 0.0
