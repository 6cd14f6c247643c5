"""Blocks of real numbers and small integers to bytes and back, through one range coder.

Every value carries a class (``tables.quantiser``) that says how wide it is against its step. Classes above the widest
table send their low bits as they are; magnitudes beyond a table's outermost symbol follow it as an Elias-gamma number.
"""

import math
from collections.abc import Iterator
from typing import Any

import constriction
import numpy as np
from jaxtyping import Float, Int

from adapterbank.codec.tables import CLASS_TOP, CLASS_ZERO, CLASSES_PER_OCTAVE, Quantiser, quantiser
from adapterbank.errors import BankError

CLASS_LIMIT = CLASS_TOP + 16 * CLASSES_PER_OCTAVE
"""Widest class there is: a table plus 16 plain bits, beyond what float32 factors hold."""
INTEGER_REACH = 24
"""Integers of metadata up to this magnitude have a symbol of their own."""
LARGEST = 1 << 40
"""What lies beyond an outermost symbol by more than this is cut off; a damaged payload that says more is refused."""

# constriction's submodules are attributes, not importable modules
Categorical, Uniform = constriction.stream.model.Categorical, constriction.stream.model.Uniform
_models: dict[int, Any] = {}


def _model(class_: int) -> Any:
    """The coder's model of one class; built once, as building costs more than coding a row."""
    if class_ not in _models:
        _models[class_] = Categorical(quantiser(class_).frequencies.astype(np.float32), perfect=False)
    return _models[class_]


# two-sided geometric, halving every 1.5 steps: differences of classes between neighbouring vectors look like that
_integer_model = Categorical(
    np.round(2.0 ** (14 - np.abs(np.arange(-INTEGER_REACH, INTEGER_REACH + 1)) / 1.5)).clip(1).astype(np.float32),
    perfect=False,
)


def split_class(class_: int) -> tuple[int, int]:
    """Return ``(class with a table, plain low bits)`` of a class."""
    plain = max(0, -(-(class_ - CLASS_TOP) // CLASSES_PER_OCTAVE))
    return class_ - plain * CLASSES_PER_OCTAVE, plain


def _cells(table: Quantiser, magnitudes: np.ndarray) -> np.ndarray:
    """Index of the cell of each magnitude; only the first thresholds are irregular, but a search costs little."""
    cells: np.ndarray = np.searchsorted(table.thresholds, magnitudes, side="right").astype(np.int32)
    return cells


def _groups(classes: Int[np.ndarray, "p _"]) -> Iterator[tuple[int, np.ndarray]]:
    """Each class that codes anything, ascending, and where it applies: single values, or whole rows of a ``(p, 1)``."""
    where = classes[:, 0] if classes.shape[1] == 1 else classes
    for class_ in sorted(set(where.ravel().tolist())):
        if class_ > CLASS_ZERO:
            yield class_, where == class_


class Writer:
    """Collects values and integers in order; ``finish`` returns the bytes."""

    def __init__(self) -> None:
        self._coder = constriction.stream.queue.RangeEncoder()

    def integer(self, value: int) -> None:
        """Code a small signed integer; cheap near zero, anything up to ``LARGEST`` allowed."""
        inner = max(-INTEGER_REACH, min(INTEGER_REACH, value))
        self._coder.encode(np.array([inner + INTEGER_REACH], dtype=np.int32), _integer_model)
        if abs(inner) == INTEGER_REACH:
            self._gamma(abs(value) - INTEGER_REACH)

    def values(self, steps: Float[np.ndarray, "p d"], classes: Int[np.ndarray, "p _"]) -> Float[np.ndarray, "p d"]:
        """Quantise ``steps`` (values over their step) by their classes, code them, and return what a reader will see.

        Args:
            steps: Values in units of their step.
            classes: Class of each value, or ``(p, 1)`` of each row; ``CLASS_ZERO`` or below codes nothing, decodes to
            0.
        """
        decoded = np.zeros(steps.shape, dtype=np.float32)
        for class_, chosen in _groups(classes):
            block = steps[chosen]
            decoded[chosen] = self._one_class(block.reshape(-1), class_).reshape(block.shape)
        return decoded

    def _one_class(self, steps: np.ndarray, class_: int) -> np.ndarray:
        table_class, plain = split_class(class_)
        table = quantiser(table_class)
        if plain:
            return self._fine(steps, table_class, plain)
        magnitudes = np.abs(steps)
        cells = _cells(table, magnitudes)
        symbols = np.where(steps < 0, -cells, cells)
        self._coder.encode(symbols + table.top, _model(table_class))
        levels = table.levels[cells]
        outer = np.flatnonzero(cells == table.top)
        for i in outer:  # rare by construction: beyond six standard deviations
            beyond = max(0, round(min(float(magnitudes[i]), LARGEST)) - table.top)
            self._gamma(beyond)
            levels[i] = table.top + beyond
        decoded: np.ndarray = np.where(steps < 0, -levels, levels)
        return decoded

    def _fine(self, steps: np.ndarray, table_class: int, plain: int) -> np.ndarray:
        """Integers whose high part goes through the table and whose low bits go as they are."""
        table = quantiser(table_class)
        whole = np.rint(steps.astype(np.float64)).clip(-LARGEST, LARGEST).astype(np.int64)
        high = (whole + (1 << plain >> 1)) >> plain
        low = whole - (high << plain) + (1 << plain >> 1)
        inner = np.clip(high, -table.top, table.top)
        self._coder.encode((inner + table.top).astype(np.int32), _model(table_class))
        for i in np.flatnonzero(np.abs(inner) == table.top):
            self._gamma(int(abs(high[i])) - table.top)
        self._coder.encode(low.astype(np.int32), Uniform(1 << plain))
        return whole.astype(np.float32)

    def _gamma(self, value: int) -> None:
        width = (value + 1).bit_length() - 1
        self._coder.encode(np.array([width], dtype=np.int32), Uniform(64))
        for shift in range(0, width, 16):
            part = ((value + 1) >> shift) & ((1 << min(16, width - shift)) - 1)
            self._coder.encode(np.array([part], dtype=np.int32), Uniform(1 << min(16, width - shift)))

    def finish(self) -> np.ndarray:
        """All bytes, little endian words of 32 bits."""
        words: np.ndarray = self._coder.get_compressed().astype("<u4")
        return words.view(np.uint8)


class Reader:
    """Reads what a ``Writer`` wrote, in the same order.

    Raises:
        BankError: If the bytes can't come from a writer.
    """

    def __init__(self, payload: np.ndarray) -> None:
        if payload.nbytes % 4:
            raise BankError(f"a payload of {payload.nbytes} bytes is not made of 32-bit words")
        self._coder = constriction.stream.queue.RangeDecoder(payload.view("<u4").astype(np.uint32))
        # the decoder reads on behind the end for ever; an integer costs at least 2 bits, so this many can't be there
        self._integers_left = 4 * payload.nbytes + 32

    def integer(self) -> int:
        """One integer of ``Writer.integer``."""
        self._integers_left -= 1
        if self._integers_left < 0:
            raise BankError("a payload is damaged: it ends early")
        inner = int(self._decode(_integer_model, 1)[0]) - INTEGER_REACH
        if abs(inner) < INTEGER_REACH:
            return inner
        magnitude = INTEGER_REACH + self._gamma()
        return magnitude if inner > 0 else -magnitude

    def values(self, classes: Int[np.ndarray, "p _"], width: int) -> Float[np.ndarray, "p width"]:
        """The values of ``Writer.values``, in units of their steps; ``width`` is the length of a row."""
        if classes.size and classes.max() > CLASS_LIMIT:
            raise BankError(f"a payload is damaged: class {classes.max()} of values, the widest is {CLASS_LIMIT}")
        decoded = np.zeros((len(classes), width), dtype=np.float32)
        for class_, chosen in _groups(classes):
            shape = decoded[chosen].shape
            decoded[chosen] = self._one_class(math.prod(shape), class_).reshape(shape)
        return decoded

    def _one_class(self, count: int, class_: int) -> np.ndarray:
        table_class, plain = split_class(class_)
        table = quantiser(table_class)
        symbols = self._decode(_model(table_class), count).astype(np.int64) - table.top
        cells = np.abs(symbols)
        outer = np.flatnonzero(cells == table.top)
        if plain:
            high = symbols
            for i in outer:
                high[i] = np.sign(symbols[i]) * (table.top + self._gamma())
            low = self._decode(Uniform(1 << plain), count).astype(np.int64)
            return ((high << plain) + low - (1 << plain >> 1)).astype(np.float32)
        levels = table.levels[cells]
        for i in outer:
            levels[i] = table.top + self._gamma()
        return np.where(symbols < 0, -levels, levels)

    def _gamma(self) -> int:
        width = int(self._decode(Uniform(64), 1)[0])
        if 1 << width > 2 * LARGEST:
            raise BankError(f"a payload is damaged: a number of {width} bits")
        value = 1 << width
        for shift in range(0, width, 16):
            value |= int(self._decode(Uniform(1 << min(16, width - shift)), 1)[0]) << shift
        return value - 1

    def _decode(self, model: Any, count: int) -> np.ndarray:
        try:
            decoded: np.ndarray = self._coder.decode(model, count)
            return decoded
        except (AssertionError, ValueError) as e:
            raise BankError(f"a payload is damaged: {e}") from e
