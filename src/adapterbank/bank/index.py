"""``bank.json``: what a bank is made of, without any tensor."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from adapterbank.adapters import check_name
from adapterbank.adapters.task import LARGEST
from adapterbank.errors import AdapterError, BankError

FORMAT = 1
METHODS = ("product", "eigenlora", "flat")
CODINGS = ("predictive", "int16", "float32")
SHA256 = re.compile(r"[0-9a-f]{64}")
WIDEST = 1 << 24
"""Features of a layer; twenty times the largest vocabulary."""


@dataclass(frozen=True, kw_only=True)
class ModuleEntry:
    """One adapted linear layer of the base model."""

    name: str
    d_in: int
    d_out: int


@dataclass(frozen=True, kw_only=True)
class TaskEntry:
    """Which basis the coefficients of a task that was trained in the bank mean; see ``Bank.basis``."""

    k: int | None
    """Directions a side that were asked for."""
    members: int
    """Derived directions come from so many ordinary members, the first ones; 0: nothing is derived."""
    fingerprint: str
    probe: float
    core: bool = False
    """One core of each module, not coefficients of A and B."""
    random: int = 0
    """Seeded random directions a side, after those of the bank."""
    seed: int = 0
    """Of the random directions."""
    coded: bool = False
    """Coded with an error, as ordinary members are; else 32 bits a coefficient."""


@dataclass(frozen=True, kw_only=True)
class MemberEntry:
    """One adapter of the bank."""

    sha256: str
    """Hash of its file, whose name begins with it."""
    source: str
    """First 16 digits of the sha256 of the weights it was made from; empty if it was made in memory."""
    source_bytes: int
    """Bytes of those weights as they were stored, task head apart."""
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
    task: TaskEntry | None = None
    """Set where the member is a trained task, stored by its own coefficients; none: an ordinary member."""


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

    @property
    def plain_bits(self) -> int:
        """Bits of a value in the plain codings."""
        return 32 if self.coding == "float32" else 16

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
        except (ValueError, RecursionError) as error:
            raise BankError(f"{where} is no JSON: {error}; the bank is damaged, restore it from a copy") from error
        if not isinstance(data, dict) or type(data.get("format")) is not int or data["format"] < 1:
            raise BankError(f"{where} is no bank index: it has no format number")
        if data["format"] > FORMAT:
            raise BankError(
                f"{where} is of format {data['format']}, this version reads up to {FORMAT}; upgrade adapterbank"
            )
        try:
            return cls._checked(data)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, AdapterError) as error:
            raise BankError(f"{where} is damaged: {type(error).__name__}: {error}; restore it from a copy") from error

    @classmethod
    def _checked(cls, data: dict[str, Any]) -> "BankIndex":
        for key, values in (("method", METHODS), ("coding", CODINGS)):
            if data[key] not in values:
                raise ValueError(f"{key} {data[key]!r} is unknown")
        modules = tuple(
            ModuleEntry(name=_text(n), d_in=_natural(i, 1, WIDEST), d_out=_natural(o, 1, WIDEST))
            for n, i, o in data["modules"]
        )
        configs = tuple(dict(c) for c in data["configs"])
        members = {check_name(name): _member(entry, len(configs)) for name, entry in data["members"].items()}
        for names in ([m.name for m in modules], [name.casefold() for name in members]):
            if len(set(names)) < len(names):
                raise ValueError("a name appears twice")
        ordinary = 0
        for name, member in members.items():
            if member.task is not None and member.task.members > ordinary:
                raise ValueError(f"task {name!r} needs {member.task.members} members before it, there are {ordinary}")
            if member.task is not None and member.task.coded and data["coding"] != "predictive":
                raise ValueError(f"task {name!r} is coded in a bank of {data['coding']} values")
            ordinary += member.task is None
        return cls(
            method=data["method"],
            coding=data["coding"],
            parameters=dict(data["parameters"]),
            slope=_number(data["slope"]),
            base=None if data["base"] is None else _text(data["base"]),
            basis=_digest(data["basis"]),
            basis_bytes=_natural(data["basis_bytes"]),
            modules=modules,
            configs=configs,
            members=members,
        )


def _member(entry: Mapping[str, Any], configs: int) -> MemberEntry:
    if unknown := entry.keys() - {f.name for f in fields(MemberEntry)}:
        raise ValueError(f"a member has an unknown field {min(unknown)!r}")
    return MemberEntry(
        sha256=_digest(entry["sha256"]),
        source=_text(entry["source"]),
        **{key: _natural(entry[key]) for key in ("source_bytes", "values", "bytes", "r")},
        alpha=_number(entry["alpha"]),
        error=_number(entry["error"]),
        scales=tuple(_number(s) for s in entry["scales"]),
        config=_natural(entry["config"], 0, configs - 1),
        bound=bool(entry.get("bound", False)),
        task=None if entry.get("task") is None else _task(entry["task"]),
    )


def _task(entry: Mapping[str, Any]) -> TaskEntry:
    if unknown := entry.keys() - {f.name for f in fields(TaskEntry)}:
        raise ValueError(f"a task has an unknown field {min(unknown)!r}")
    return TaskEntry(
        k=None if entry["k"] is None else _natural(entry["k"]),
        members=_natural(entry["members"]),
        fingerprint=_text(entry["fingerprint"]),
        probe=_number(entry["probe"]),
        core=bool(entry.get("core", False)),
        random=_natural(entry.get("random", 0)),
        seed=_natural(entry.get("seed", 0), -LARGEST),
        coded=bool(entry.get("coded", False)),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def _digest(value: Any) -> str:
    if not SHA256.fullmatch(_text(value)):  # it becomes a file name
        raise ValueError(f"{value!r} is no sha256")
    return str(value)


def _natural(value: Any, least: int = 0, most: int = LARGEST) -> int:
    # bool is an int to Python
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{value!r} is no whole number in [{least}, {most}]")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no finite number")
    return float(value)


_DEFAULTS = {kind: {f.name: f.default for f in fields(kind)} for kind in (MemberEntry, TaskEntry)}


def _sparse(entry: MemberEntry) -> dict[str, Any]:
    """Without the fields that have their default."""
    data = _without_defaults(entry)
    if entry.task is not None:
        data["task"] = _without_defaults(entry.task)
    return data


def _without_defaults(entry: MemberEntry | TaskEntry) -> dict[str, Any]:
    return {key: value for key, value in asdict(entry).items() if value != _DEFAULTS[type(entry)].get(key, MISSING)}


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
