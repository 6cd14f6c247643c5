"""How many bytes a bank takes on the device that serves it, before anything is put there."""

from dataclasses import dataclass

import torch

from adapterbank.bank import Bank
from adapterbank.errors import BankError
from adapterbank.runtime.members import LayerBasis, Splitter, directions

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


def plan(
    bank: Bank,
    *,
    members: int | None = None,
    k: int | None = None,
    bits: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Plan:
    """What an engine of this bank will hold.

    Args:
        bank: The bank.
        members: So many of the bank's kind; by default those that it has.
        k: As for the engine.
        bits: As for the engine.
        dtype: Of the base model, in which the shared directions are held.

    Raises:
        BankError: If a sampled member is damaged, or the bank can't give ``k``, or ``members`` is negative.
    """
    if members is not None and members < 0:
        raise BankError(f"members={members} is no number of members; give 0 or more")
    basis = bank.basis(directions(bank) if k is None else k)
    bases = {module: LayerBasis.of(part) for module, part in basis.modules.items()}
    splitter, count = Splitter(bases, bits), min(SAMPLE, len(bank))
    names = [bank.names[i * len(bank) // count] for i in range(count)]
    read = [splitter.split(bank.reconstruct(name)) for name in names]
    # by values: members of other ranks take more or less in the same measure
    values = sum(bank[name].values for name in bank.names)
    growth = 1.0 if members is None else members / max(1, len(bank))
    share = growth * values / max(1, sum(bank[name].values for name in names))
    return Plan(
        members=len(bank) if members is None else members,
        basis_bytes=sum(part.V.numel() + part.U.numel() for part in bases.values()) * dtype.itemsize,
        shared_bytes=round(share * sum(member.coefficients.bytes for member in read)),
        private_bytes=round(share * sum(part.bytes for member in read for part in member.private.values())),
        head_bytes=round(sum(t.nbytes for m in read for t in m.heads.values()) * growth * len(bank) / max(1, count)),
        full_bytes=round(FULL_BYTES * growth * values),
        sampled=count,
    )
