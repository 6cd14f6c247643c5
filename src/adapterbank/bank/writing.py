"""Files of a fitted bank, all but the index, and what a bank weighs."""

from pathlib import Path

from torch import Tensor

from adapterbank.bank import store
from adapterbank.bank.family import Family, Progress
from adapterbank.bank.index import BankIndex, MemberEntry
from adapterbank.bank.members import MemberCoder, MemberConfigs
from adapterbank.bank.settings import FitSettings

HEADER_BYTES = 84
"""Bytes of a file that are not payload, about."""


def write_bank(
    directory: Path,
    basis: Tensor,
    coder: MemberCoder,
    settings: FitSettings,
    *,
    slope: float,
    progress: Progress | None,
) -> BankIndex:
    """Code every adapter, write basis and members, and return the index that names them."""
    family = coder.family
    data, digest = store.serialise({"payload": basis})
    store.write_file(directory, store.basis_file(digest), data, digest, durable=False)
    members = {}
    for i, adapter in enumerate(family.adapters):
        coded = coder.code(i)
        store.write_file(
            directory, store.member_file(coded.entry.sha256), coded.data, coded.entry.sha256, durable=False
        )
        members[adapter.name] = coded.entry
        if progress:
            progress("coding adapters", i + 1, len(family.adapters))
    return BankIndex(
        method=settings.method,
        coding=settings.coding,
        parameters=settings.to_json(),
        slope=slope,
        base=family.base,
        basis=digest,
        basis_bytes=len(data),
        modules=tuple(coder.modules),
        configs=coder.configs.all(),
        members=members,
    )


def bank_bytes(index: BankIndex) -> int:
    """Bytes of a bank on disk: index, basis and members, task heads apart."""
    # members of equal content share one file
    files = {member.sha256: member.bytes for member in index.members.values()}
    return len(index.to_json().encode()) + index.basis_bytes + sum(files.values())


def fixed_bytes(family: Family, settings: FitSettings) -> int:
    """Bytes of the index and of file headers, about: what is left of a budget is for codes."""
    configs = MemberConfigs()
    entry = MemberEntry(
        sha256="0" * 64, source="0" * 16, source_bytes=10**7, values=10**6, bytes=10**5, r=8, alpha=16.0, scales=(2.0,),
        config=0, error=0.123456,
    )  # fmt: skip
    for adapter in family.adapters:
        configs.index_of(adapter)
    index = BankIndex(
        method=settings.method, coding=settings.coding, parameters=settings.to_json(), slope=1.2345678901234567e-09,
        base=family.base, basis="0" * 64, basis_bytes=10**6,
        modules=tuple(family.modules[name] for name in family.module_names()), configs=configs.all(),
        members={name: entry for name in family.names()},
    )  # fmt: skip
    return len(index.to_json().encode()) + HEADER_BYTES * (len(family.adapters) + 1)
