"""What a fit is asked for, checked at the door."""

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

from adapterbank.bank.index import METHODS
from adapterbank.errors import BankError
from adapterbank.subspace.eigenlora import Mean

DEFAULT_MAX_ERROR = 0.05
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([kMGT]?i?)b?\s*", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """Arguments of a fit, as they are stored in the index.

    Raises:
        BankError: If they contradict each other or make no sense.
    """

    method: str = "product"
    """``product`` (default), or the papers' ``eigenlora`` and ``flat``."""
    k: int | None = None
    """Exactly so many shared directions a side."""
    ratio: float | None = None
    """Bytes of all A and B in float32, over bytes of the bank."""
    budget: int | None = None
    """Bytes of the bank."""
    max_error: float | None = None
    """Largest relative error of any adapter's update."""
    quantize: bool = True
    """Off: 32-bit floats."""
    mean: Mean = "affine"
    """Of ``eigenlora`` and ``flat``: ``affine``, ``drop`` or ``none``."""
    balance: bool = False
    """Of ``eigenlora`` and ``flat``: balance A and B first, which makes the result independent of their gauge."""
    seed: int = 0

    def __post_init__(self) -> None:
        targets = [t for t in ("ratio", "budget", "max_error") if getattr(self, t) is not None]
        if len(targets) > 1:
            raise BankError(f"give one target, not {' and '.join(targets)}")
        for name in targets:
            check_positive(name, getattr(self, name))
        if self.method not in METHODS:
            raise BankError(f"method {self.method!r} is unknown; choose one of {', '.join(METHODS)}")
        if self.mean not in ("affine", "drop", "none"):
            raise BankError(f"mean {self.mean!r} is unknown; choose affine, drop or none")
        if self.k is not None and (not isinstance(self.k, int) or isinstance(self.k, bool) or self.k < 1):
            raise BankError(f"k must be at least 1 and whole, not {self.k!r}")
        if self.method != "product" and self.k is None and self.max_error is not None:
            raise BankError(f"method {self.method!r} does not fit to an error; give k, ratio or budget")
        if self.method != "product" and not targets and self.k is None:
            raise BankError(f"method {self.method!r} needs k, ratio or budget")
        if self.k is not None and targets and (self.method != "product" or not self.quantize):
            raise BankError(f"k fixes the size of a {self.method} bank of plain values; leave out {targets[0]}")

    @property
    def coding(self) -> str:
        """How values are stored."""
        if not self.quantize:
            return "float32"
        return "int16" if self.method != "product" or (self.k is not None and not self._target) else "predictive"

    @property
    def plain_bits(self) -> int:
        """Bits of a value in the plain codings."""
        return 16 if self.quantize else 32

    @property
    def _target(self) -> bool:
        return self.ratio is not None or self.budget is not None or self.max_error is not None

    @property
    def error(self) -> float | None:
        """The error to keep: given, or the default where nothing is."""
        if self.max_error is None and not self._target and self.k is None:
            return DEFAULT_MAX_ERROR
        return self.max_error

    def bytes(self, values: int) -> int | None:
        """The bytes to keep within, for adapters of so many values; none where an error or k decides."""
        if self.ratio is not None:
            return int(4 * values / self.ratio)
        return self.budget

    def to_json(self) -> dict[str, Any]:
        """What was given, less the defaults."""
        default = FitSettings()
        return {key: value for key, value in asdict(self).items() if value != getattr(default, key)}


def check_positive(name: str, value: Any) -> None:
    """Refuse what is no target.

    Raises:
        BankError: Unless it is a positive number.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not (number and value > 0):
        raise BankError(f"{name} must be a positive number, not {value!r}")


def parse_bytes(text: str | int) -> int:
    """``20MB``, ``1.5 GiB`` or a plain number, as bytes.

    Raises:
        BankError: If it is none of these.
    """
    match = _SIZE.fullmatch(str(text))
    if match is None or int(float(match[1]) * _UNITS[match[2].lower()]) < 1:
        raise BankError(f"{text!r} is no size in bytes; write 300kB, 20MB, 1.5GiB or 20000000")
    return int(float(match[1]) * _UNITS[match[2].lower()])
