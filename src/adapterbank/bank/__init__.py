"""Many adapters on a shared basis, in memory and on disk."""

from adapterbank.bank.bank import Bank
from adapterbank.bank.index import BankIndex, MemberEntry, ModuleEntry
from adapterbank.bank.partial import PartialFit

__all__ = ["Bank", "BankIndex", "MemberEntry", "ModuleEntry", "PartialFit"]
