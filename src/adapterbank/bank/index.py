"""``bank.json``: what a bank is made of, without any tensor."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from adapterbank.adapters import check_name
from adapterbank.errors import AdapterError, BankError

FORMAT = 1
METHODS = ("product", "eigenlora", "flat")
CODINGS = ("predictive", "int16", "float32")
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class ModuleEntry:
    """One adapted linear layer of the base model."""

    name: str
    d_in: int
    d_out: int


@dataclass(frozen=True, kw_only=True)
class MemberEntry:
    """One adapter of the bank."""

    sha256: str
    """Hash of its file, whose name begins with it."""
    source: str
    """First 16 digits of the sha256 of the weights it was made from; empty if it was made in memory."""
    source_bytes: int
    """Bytes of those weights as they were stored."""
    values: int
    """Values of all A and B."""
    bytes: int
    """Bytes of its file, task head apart."""
    r: int
    alpha: float
    scales: tuple[float, ...]
    """The distinct scales of its modules; the payload says which module has which."""
    config: int
    """Which of the bank's configs it has."""
    error: float
    """Relative error of its update, over all modules; at most that where ``bound`` is set."""
    bound: bool = False
    """The error is a bound: the member was coded from an already coded one."""


@dataclass(frozen=True, kw_only=True)
class BankIndex:
    """Everything but the tensors."""

    method: str
    coding: str
    parameters: Mapping[str, Any]
    """What ``fit`` was asked for."""
    slope: float
    """The multiplier that new members are coded with; 0 in plain banks."""
    base: str | None
    basis: str
    """sha256 of the basis file."""
    basis_bytes: int
    modules: tuple[ModuleEntry, ...]
    configs: tuple[Mapping[str, Any], ...] = ()
    """Distinct adapter configs, less ranks, scales and base."""
    members: Mapping[str, MemberEntry] = field(default_factory=dict)

    def to_json(self) -> str:
        """One member a line, so that a bank of thousands can still be read and compared."""
        data = {"format": FORMAT} | {f.name: getattr(self, f.name) for f in fields(self)}
        data["modules"] = [[m.name, m.d_in, m.d_out] for m in self.modules]
        members = data.pop("members")
        head = ",\n".join(f"{json.dumps(key)}:{_compact(value)}" for key, value in data.items())
        lines = ",\n".join(f"{json.dumps(name)}:{_compact(_sparse(entry))}" for name, entry in members.items())
        return f'{{{head},\n"members":{{\n{lines}\n}}}}\n'

    @classmethod
    def from_json(cls, text: str, where: str) -> "BankIndex":
        """Read and check an index.

        Raises:
            BankError: If it isn't one, or is of a newer format.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise BankError(f"{where} is no JSON: {error}; the bank is damaged, restore it from a copy") from error
        if not isinstance(data, dict) or not isinstance(data.get("format"), int):
            raise BankError(f"{where} is no bank index: it has no format number")
        if data["format"] > FORMAT:
            raise BankError(
                f"{where} is of format {data['format']}, this version reads up to {FORMAT}; upgrade adapterbank"
            )
        try:
            return cls._checked(data)
        except (KeyError, TypeError, ValueError, AttributeError, AdapterError) as error:
            raise BankError(f"{where} is damaged: {type(error).__name__}: {error}; restore it from a copy") from error

    @classmethod
    def _checked(cls, data: dict[str, Any]) -> "BankIndex":
        modules = tuple(ModuleEntry(name=str(n), d_in=_size(i), d_out=_size(o)) for n, i, o in data["modules"])
        members = {
            check_name(name): MemberEntry(**{**entry, "scales": tuple(float(s) for s in entry["scales"])})
            for name, entry in data["members"].items()
        }
        index = cls(**{f.name: data[f.name] for f in fields(cls)} | {"modules": modules, "members": members})
        if index.method not in METHODS or index.coding not in CODINGS:
            raise ValueError(f"method {index.method!r} or coding {index.coding!r} is unknown")
        for digest in (index.basis, *(m.sha256 for m in members.values())):
            if not SHA256.fullmatch(digest):  # it becomes a file name
                raise ValueError(f"{digest!r} is no sha256")
        return replace(index, configs=tuple(dict(c) for c in index.configs))


def _size(value: Any) -> int:
    if not isinstance(value, int) or not 0 < value < 2**31:
        raise ValueError(f"{value!r} is no size")
    return value


def _sparse(entry: MemberEntry) -> dict[str, Any]:
    data = asdict(entry)
    if not data["bound"]:
        del data["bound"]
    return data


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
