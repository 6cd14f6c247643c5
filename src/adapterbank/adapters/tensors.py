"""Where an adapter's tensors come from: a safetensors file read one tensor at a time, or a dict in memory.

The file format is parsed here because these files come from strangers: every number in a header is checked against the
file before anything is allocated, and no memory map is kept (mapped pages count as resident memory, which would make
a fit over a thousand adapters grow with their number).
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from adapterbank.errors import AdapterError, MissingFileError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
MAX_HEADER = 100_000_000
"""The reference implementation's limit."""
MAX_DIMS = 16
MAX_NAME = 512


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file: what it is and where its bytes are, counted from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0
    stop: int = 0


class TensorFile:
    """A safetensors file: the header is read once, each tensor when it is asked for; the file is never kept open.

    Args:
        path: The file.
        label: What errors call it; by default its path.

    Raises:
        MissingFileError: If there is no such file.
        AdapterError: If the header is not that of a whole, well-formed safetensors file.
    """

    def __init__(self, path: Path, label: str | None = None) -> None:
        self.path = path
        self.label = label or str(path)
        try:
            with path.open("rb", buffering=0) as file:
                self.size = file.seek(0, 2)
                self.entries: Mapping[str, TensorEntry] = _read_header(file, self.size, self.label)
        except FileNotFoundError as error:
            raise MissingFileError(f"{self.label} does not exist") from error
        except OSError as error:
            raise AdapterError(f"{self.label} can't be read: {error.strerror or error}") from error

    def read(self, name: str) -> Tensor:
        """A fresh tensor on the CPU, in its stored dtype."""
        entry = self.entries[name]
        length = entry.stop - entry.start
        if length == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        try:
            with self.path.open("rb", buffering=0) as file:
                if file.seek(0, 2) != self.size:
                    raise AdapterError(f"{self.label} changed while it was in use; load the adapter again")
                data = _read_exactly(file, entry.start, length, self.label)
        except OSError as error:
            raise AdapterError(f"{self.label} can't be read any more: {error.strerror or error}") from error
        return torch.frombuffer(data, dtype=entry.dtype).reshape(entry.shape)

    def digest(self) -> str:
        """sha256 of the file."""
        sha = hashlib.sha256()
        try:
            with self.path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    sha.update(chunk)
        except OSError as error:
            raise AdapterError(f"{self.label} can't be read any more: {error.strerror or error}") from error
        return sha.hexdigest()


class TensorDict:
    """Tensors held in memory, read through the same names as a file's.

    Args:
        tensors: The tensors by name; not copied.
        size: Bytes of the file that they came from; their own bytes where there is none.
        sha256: Hash of that file; of the tensors where there is none.

    Raises:
        AdapterError: If a value is not a dense tensor with data.
    """

    def __init__(self, tensors: Mapping[str, Any], *, size: int | None = None, sha256: str | None = None) -> None:
        for name, tensor in tensors.items():
            if not _is_name(name) or not isinstance(tensor, Tensor):
                raise AdapterError(f"state dict entry {name!r} is a {type(tensor).__name__}, expected a tensor")
            if tensor.is_meta or tensor.is_quantized or tensor.layout != torch.strided:
                raise AdapterError(f"state dict entry {name!r} is not a dense tensor with values of its own")
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self._sha256 = sha256
        self.entries: Mapping[str, TensorEntry] = {
            name: TensorEntry(tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors.items()
        }
        stored = sum(tensor.numel() * tensor.element_size() for tensor in self._tensors.values())
        self.size = stored if size is None else size

    def read(self, name: str) -> Tensor:
        """A fresh tensor on the CPU, in its stored dtype."""
        tensor: Tensor = self._tensors[name]
        return tensor.to("cpu", copy=True).contiguous()

    def digest(self) -> str:
        """sha256 of the file that they came from, or of names, dtypes, shapes and values."""
        if self._sha256 is None:
            sha = hashlib.sha256()
            for name in sorted(self._tensors):
                tensor = self.read(name)
                sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                # bytes, because numpy knows no bfloat16
                sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
            self._sha256 = sha.hexdigest()
        return self._sha256


TensorSource = TensorFile | TensorDict


def _read_exactly(file: Any, start: int, length: int, label: str) -> bytearray:
    data = bytearray(length)
    view, done = memoryview(data), 0
    file.seek(start)
    while done < length:  # one read returns at most 2 GB on Linux
        count = file.readinto(view[done:])
        if not count:
            raise AdapterError(f"{label} ends early: {length} bytes expected at {start}, {done} found; copy it again")
        done += count
    return data


def _read_header(file: Any, size: int, label: str) -> dict[str, TensorEntry]:
    if size < 8:
        raise AdapterError(f"{label} is no safetensors file: it holds {size} bytes; copy it again")
    length = int.from_bytes(_read_exactly(file, 0, 8, label), "little")
    if length > min(size - 8, MAX_HEADER):
        raise AdapterError(
            f"{label} is no whole safetensors file: its header would take {length} bytes and the file holds {size}; "
            "copy it again"
        )
    try:
        header = json.loads(_read_exactly(file, 8, length, label).decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{label} is no safetensors file: its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise AdapterError(
            f"{label} is no safetensors file: its header is a {type(header).__name__}, expected an object"
        )
    header.pop("__metadata__", None)
    entries = {name: _entry(name, value, 8 + length, size, label) for name, value in header.items()}
    stop = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start < stop:
            raise AdapterError(f"{label}: tensor {name!r} overlaps another one; the file was made by hand, get it anew")
        stop = entry.stop
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def _entry(name: str, value: Any, offset: int, size: int, label: str) -> TensorEntry:
    """Check one line of a header: the shape must fill its span, the span must lie inside the file."""
    if not _is_name(name):
        raise AdapterError(f"{label}: {name[:40]!a} is no tensor name: up to {MAX_NAME} printable characters expected")
    if not isinstance(value, dict):
        raise AdapterError(f"{label}: tensor {name!r} is described by a {type(value).__name__}, expected an object")
    dtype = value.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise AdapterError(
            f"{label}: tensor {name!r} has dtype {str(dtype)[:40]!r}, expected one of {', '.join(DTYPES)}"
        )
    shape, span = value.get("shape"), value.get("data_offsets")
    if not _naturals(shape) or len(shape) > MAX_DIMS or not _naturals(span) or len(span) != 2:
        raise AdapterError(f"{label}: tensor {name!r} has no readable shape and data_offsets")
    start, stop = offset + span[0], offset + span[1]
    if not start <= stop <= size:
        raise AdapterError(
            f"{label}: tensor {name!r} would end at byte {stop} and the file holds {size}: "
            "it was cut short or its header promises too much; copy it again"
        )
    if math.prod(shape) * DTYPES[dtype].itemsize != stop - start:
        raise AdapterError(
            f"{label}: tensor {name!r} of shape {tuple(shape)} in {dtype} does not take {stop - start} bytes"
        )
    return TensorEntry(DTYPES[dtype], tuple(shape), start, stop)


def _naturals(value: object) -> TypeGuard[list[int]]:
    # bool is an int to Python; a file of at most 2**63 bytes can't hold larger sizes
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _is_name(name: object) -> bool:
    # isprintable also refuses lone surrogates, which no message could show and no file could store
    return isinstance(name, str) and len(name) <= MAX_NAME and name.isprintable()
