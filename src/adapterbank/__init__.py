"""Recycle LoRA adapters into a bank: one shared basis per layer, a few coefficients per adapter."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapterbank.adapters import LoraAdapter, LoraFactors
    from adapterbank.bank import Bank, PartialFit
    from adapterbank.bank.diagnose import Diagnosis, diagnose
    from adapterbank.errors import AdapterBankError, AdapterError, BankError, MissingFileError, UnknownNameError
    from adapterbank.shira import SparseDelta

__version__ = "0.1.0"

__all__ = [
    "AdapterBankError",
    "AdapterError",
    "Bank",
    "BankError",
    "Diagnosis",
    "LoraAdapter",
    "LoraFactors",
    "MissingFileError",
    "PartialFit",
    "SparseDelta",
    "UnknownNameError",
    "__version__",
    "diagnose",
]

_HOMES = {
    "adapterbank.adapters": ("LoraAdapter", "LoraFactors"),
    "adapterbank.bank": ("Bank", "PartialFit"),
    "adapterbank.bank.diagnose": ("Diagnosis", "diagnose"),
    "adapterbank.shira": ("SparseDelta",),
    "adapterbank.errors": ("AdapterBankError", "AdapterError", "BankError", "MissingFileError", "UnknownNameError"),
}


def __getattr__(name: str) -> Any:
    # on first use: torch takes a second to import, and `adapterbank --help` should not wait for it
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(home), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
