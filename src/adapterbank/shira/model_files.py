"""Switching on disk: a model directory whose weights hold one sparse adapter at a time, for whatever loads it.

Values are overwritten in the model's own safetensors files. What was there is kept beside them in ``STATE``, which is
complete before the first value is changed, so that the base model comes back bit for bit, also after a power cut.
"""

import json
import math
import mmap
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from adapterbank.adapters.disk import locked, replace_file
from adapterbank.adapters.tensors import TensorFile
from adapterbank.errors import AdapterError, MissingFileError
from adapterbank.shira.delta import FLOATS, SparseDelta, changed, gathered, put_

STATE = "adapterbank.base"
"""What the adapter in the weights has overwritten; there is none while they are the base model's. A safetensors file,
without that ending: vLLM loads every file that has it."""
LOCK = ".adapterbank.lock"
PARTS = ("positions", "base", "new")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Change:
    """One parameter, at the positions where an adapter changes it."""

    positions: Tensor
    base: Tensor
    new: Tensor

    def is_whole(self) -> bool:
        """Whether there is as much of everything, of the types that it is written in."""
        one, other = self.base, self.new
        typed = self.positions.dtype in (torch.int32, torch.int64) and one.dtype in FLOATS and one.dtype == other.dtype
        return typed and self.positions.ndim == 1 and self.positions.shape == one.shape == other.shape


@dataclass(frozen=True, kw_only=True, eq=False)
class _State:
    """The adapter that is in the weights."""

    adapter: str
    changes: dict[str, _Change]
    """By the parameter's name in the files."""


def active_in(directory: str | Path) -> str | None:
    """Name of the adapter that is in a model directory's weights; none: they are the base model's.

    Raises:
        AdapterError: If what is kept about it is damaged.
    """
    state = _read_state(Path(directory).expanduser())
    return None if state is None else state.adapter


def switch_files(
    directory: str | Path, delta: SparseDelta | None, *, alpha: float = 1.0, check: bool = True
) -> str | None:
    """Put an adapter into a model directory's weights, in the place of the one that is there; no task head.

    Args:
        directory: Holds the base model in safetensors files, in one or in shards.
        delta: The adapter; none brings back the base model.
        alpha: Its strength.
        check: Compare the adapter's fingerprint of its base.

    Returns:
        Name of the adapter that was there before.

    Raises:
        MissingFileError: If there is no model in safetensors files.
        AdapterError: If the adapter doesn't fit, the strength isn't finite, or the files are links or can't be
            written. The weights are then as they were.
    """
    if not math.isfinite(alpha):
        raise AdapterError(f"alpha={alpha} is no strength; give a finite number")
    directory = Path(directory).expanduser()
    try:
        with _mapped(_files(directory), directory) as (weights, flush):
            old = _read_state(directory)
            if old is not None:
                _check_unchanged(old, weights, directory)
                _write(weights, old, "base")  # positions of both may overlap, and fingerprints are of the base
            new = None
            if delta is not None:
                try:
                    new = _state_of(delta, weights, alpha, check)
                except AdapterError:
                    if old is not None:
                        _write(weights, old, "new")
                    raise
            flush()
            if new is not None:
                replace_file(directory / STATE, _packed(new))
                _write(weights, new, "new")
                flush()
            elif old is not None:
                (directory / STATE).unlink()
    except MissingFileError:  # an OSError too
        raise
    except OSError as error:
        raise AdapterError(f"{directory} can't be changed: {error.strerror or error}") from error
    return None if old is None else old.adapter


def skeleton(directory: str | Path) -> dict[str, Tensor]:
    """A model directory's tensors by name, without their values: what ``SparseDelta.load(model=)`` asks for.

    Raises:
        MissingFileError: If there is no model in safetensors files.
    """
    entries = [TensorFile(path).entries for path in _files(Path(directory).expanduser())]
    return {
        name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for of in entries for name, entry in of.items()
    }


def copy_model(directory: str | Path, out: str | Path) -> None:
    """Copy a model directory, links followed; a copy that fails leaves nothing.

    Raises:
        MissingFileError: If there is no model in safetensors files.
        AdapterError: If ``out`` is there already, or can't be written.
    """
    directory, out = Path(directory).expanduser(), Path(out).expanduser()
    _files(directory)
    if out.exists():
        raise AdapterError(f"{out} exists; give a new directory")
    temporary = out.parent / f".{out.name}.{secrets.token_hex(4)}.tmp"
    try:
        shutil.copytree(directory, temporary)
        os.replace(temporary, out)
    except (OSError, shutil.Error) as error:
        raise AdapterError(f"{directory} can't be copied to {out}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# --- the model's files ------------------------------------------------------------------------------------------------


def _files(directory: Path) -> list[Path]:
    indices = sorted(directory.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        try:
            names = sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise AdapterError(f"{indices[0]} is no index of weights; copy it again") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:  # a path from a file leads anywhere
                raise AdapterError(f"{indices[0]} names {str(name)[:80]!r}, which is no file beside it; copy it again")
        found = [directory / name for name in names]
    else:
        found = sorted(directory.glob("*.safetensors"))
    if not found:
        raise MissingFileError(f"{directory} holds no model in safetensors files; save it with save_pretrained")
    return found


@contextmanager
def _mapped(files: list[Path], directory: Path) -> Iterator[tuple[dict[str, Tensor], "_Flush"]]:
    """The model's tensors by name, on the files themselves; and what writes them to the disk."""
    for path in files:
        if path.is_symlink():
            raise AdapterError(f"{path} is a link, and others may use what it leads to; copy the model first (-o OUT)")
    with locked(directory / LOCK):
        found, maps = dict[str, Tensor](), list[mmap.mmap]()
        for path in files:
            entries = TensorFile(path).entries
            with path.open("r+b") as file:
                mapped = mmap.mmap(file.fileno(), 0)
            maps.append(mapped)
            for name, entry in entries.items():
                if name in found:
                    raise AdapterError(f"{directory}: two files hold {name}; leave one variant of the model there")
                if entry.stop > entry.start:
                    count = (entry.stop - entry.start) // entry.dtype.itemsize
                    tensor = torch.frombuffer(mapped, dtype=entry.dtype, count=count, offset=entry.start)
                    found[name] = tensor.view(entry.shape)
        yield found, _Flush(maps)
        # maps close with the last tensor on them


class _Flush:
    def __init__(self, maps: list[mmap.mmap]) -> None:
        self.maps = maps

    def __call__(self) -> None:
        for mapped in self.maps:
            mapped.flush()


# --- what was overwritten ---------------------------------------------------------------------------------------------


def _state_of(delta: SparseDelta, weights: dict[str, Tensor], alpha: float, check: bool) -> _State:
    """What an adapter changes in weights that are the base model's."""
    places = delta.weights_in(weights)
    names = {tensor.data_ptr(): name for name, tensor in weights.items()}
    saved = {name: gathered(places[name], update.positions) for name, update in delta.updates.items()}
    if check:
        delta.check_base(saved)
    changes = {}
    for name, update in delta.updates.items():
        new = changed(saved[name], update.values, alpha)
        changes[names[places[name].data_ptr()]] = _Change(positions=update.positions, base=saved[name], new=new)
    return _State(adapter=delta.name, changes=changes)


def _write(weights: dict[str, Tensor], state: _State, which: str) -> None:
    for name, change in state.changes.items():
        put_(weights[name], change.positions, getattr(change, which))


def _check_unchanged(state: _State, weights: dict[str, Tensor], directory: Path) -> None:
    """Every value is the base model's or the adapter's, as it must be also after a switch that was cut off."""
    for name, change in state.changes.items():
        weight = weights.get(name)
        if (
            weight is None
            or weight.dtype != change.base.dtype
            or not _reaches(weight, change.positions)
            or not _is_either(gathered(weight, change.positions), change.base, change.new)
        ):
            raise AdapterError(
                f"{directory}: {name} was changed since {state.adapter!r} was put in, so the base model can't come "
                f"back; if this is a fresh copy of the model, delete {STATE}"
            )


def _reaches(weight: Tensor, positions: Tensor) -> bool:
    return not len(positions) or 0 <= int(positions.min()) <= int(positions.max()) < weight.numel()


def _is_either(there: Tensor, one: Tensor, other: Tensor) -> bool:
    # as bits: a value that is no number isn't equal to itself
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[there.element_size()]
    return bool(((there.view(bits) == one.view(bits)) | (there.view(bits) == other.view(bits))).all())


def _packed(state: _State) -> bytes:
    tensors = {f"{part}.{name}": getattr(change, part) for name, change in state.changes.items() for part in PARTS}
    tensors["adapter"] = torch.frombuffer(bytearray(state.adapter.encode()), dtype=torch.uint8)
    data: bytes = save(tensors)
    return data


def _read_state(directory: Path) -> _State | None:
    path = directory / STATE
    if not path.exists():
        return None
    file = TensorFile(path)
    parts = {key: file.read(key) for key in file.entries}
    names = {key.partition(".")[2] for key in parts if key != "adapter"}
    damaged = AdapterError(f"{path} is damaged; copy the base model again, and delete {STATE}")
    try:
        adapter = parts["adapter"].numpy().tobytes().decode()
        changes = {name: _Change(**{part: parts[f"{part}.{name}"] for part in PARTS}) for name in names}
    except (KeyError, UnicodeDecodeError) as error:
        raise damaged from error
    if not all(change.is_whole() for change in changes.values()):
        raise damaged
    return _State(adapter=adapter, changes=changes)
