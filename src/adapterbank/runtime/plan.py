"""How many bytes a bank takes on the device that serves it, before anything is put there."""

from dataclasses import dataclass

import torch

from adapterbank.bank import Bank
from adapterbank.bank.shared_basis import BankBasis
from adapterbank.runtime.members import LayerBasis, Member, directions, split

SAMPLE = 8
"""Members that are read, evenly spread over the bank: the others are taken to be like them."""
FULL_BYTES = 2
"""Of a value of an adapter that is served as it is: vLLM and others keep 16 bits."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes of a bank in an :class:`AdapterEngine`."""

    members: int
    basis_bytes: int
    """Of the shared directions, once."""
    shared_bytes: int
    """Of all members' coefficients."""
    private_bytes: int
    """Of what the shared directions can't hold of the members."""
    head_bytes: int
    full_bytes: int
    """Of all members as full adapters at 16 bits a value, without heads."""
    sampled: int
    """Members that were read for this; the rest is extrapolated."""

    @property
    def bytes(self) -> int:
        """Of all."""
        return self.basis_bytes + self.shared_bytes + self.private_bytes + self.head_bytes


def plan(bank: Bank, *, k: int | None = None, bits: int = 16, dtype: torch.dtype = torch.float32) -> Plan:
    """What an engine of this bank will hold.

    Args:
        bank: The bank.
        k: As for the engine.
        bits: As for the engine.
        dtype: Of the base model, in which the shared directions are held.

    Raises:
        BankError: If a sampled member is damaged, or the bank can't give ``k``.
    """
    basis = bank.basis(directions(bank) if k is None else k)
    names = [bank.names[i * len(bank) // min(SAMPLE, len(bank))] for i in range(min(SAMPLE, len(bank)))]
    read = [_member(bank, basis, name, bits) for name in names]
    # by values: members of other ranks take more or less in the same measure
    share = sum(bank[name].values for name in bank.names) / max(1, sum(bank[name].values for name in names))
    parts = [part for member in read for part in member.parts.values()]
    heads = [tensor.nbytes for member in read for tensor in member.heads.values()]
    numbers = sum(module.V.numel() + module.U.numel() for module in map(LayerBasis.of, basis.modules.values()))
    return Plan(
        members=len(bank),
        basis_bytes=numbers * dtype.itemsize,
        shared_bytes=round(share * sum(part.shared_bytes for part in parts)),
        private_bytes=round(share * sum(part.private_bytes for part in parts)),
        head_bytes=round(sum(heads) * len(bank) / max(1, len(names))),
        full_bytes=FULL_BYTES * sum(bank[name].values for name in bank.names),
        sampled=len(names),
    )


def _member(bank: Bank, basis: BankBasis, name: str, bits: int) -> Member:
    adapter = bank.reconstruct(name)
    bases = {module: LayerBasis.of(basis.modules[module]) for module in adapter.modules}
    return split(adapter, bases, {module: module for module in adapter.modules}, bits)
