"""Adapters on disk: PEFT directories, single files, hub ids; and back to a PEFT directory, all or nothing."""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from adapterbank.adapters.names import check_name
from adapterbank.adapters.peft_config import CONFIG_FILE, read_config
from adapterbank.adapters.tensors import TensorDict, TensorFile, TensorSource
from adapterbank.errors import AdapterError, MissingFileError

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)


def open_source(
    source: str | Path | Mapping[str, Tensor],
    *,
    name: str | None,
    config: Mapping[str, Any] | None,
    allow_pickle: bool,
) -> tuple[str, Mapping[str, Any], TensorSource]:
    """Find an adapter's config and tensors; arguments and errors as in :meth:`LoraAdapter.load`.

    Returns:
        The adapter's name, its config as it stands there, and its tensors.
    """
    if isinstance(source, Mapping):
        name = check_name(name or "adapter")
        if config is None:
            raise AdapterError(
                f"adapter {name!r}: a state dict does not say its scale; pass config= with r and lora_alpha"
            )
        return name, config, TensorDict(source)
    directory, default_name, weights = _locate(source, allow_pickle)
    name = _name(name, default_name, source)
    where = f"adapter {name!r}"
    if config is None:
        if weights is None:
            _look_below(directory, where)
        config = read_config(directory / CONFIG_FILE, where)
    if weights is None:
        weights = _weights_in(directory, where)
    if weights.suffix == ".safetensors":
        return name, config, TensorFile(weights, f"{where}: {weights}")
    if not allow_pickle:
        raise AdapterError(
            f"{where}: {weights.name} is a pickle, which can run code when it is read; convert it to "
            f"{WEIGHTS_FILE}, or pass allow_pickle=True if you trust it"
        )
    return name, config, _read_pickle(weights, where)


def _locate(source: str | Path, allow_pickle: bool) -> tuple[Path, str, Path | None]:
    """The directory with the config, the default name, and the weights where they are already known."""
    # os.path, because Path's own raises on "~nobody"
    path = Path(os.path.expanduser(source))
    try:
        if path.is_dir():
            return path, _own_name(path), None
        if path.is_file():
            inside = path.name in (WEIGHTS_FILE, PICKLE_FILE)
            return path.parent, _own_name(path.parent) if inside else path.stem, path
    except (OSError, ValueError) as error:
        raise AdapterError(f"{str(source)[:80]!r} is no usable path: {error}") from error
    hub = HUB_ID.fullmatch(source) if isinstance(source, str) else None
    # a mistyped path must not become a question to a server
    if hub is None or Path(source).parts[0] == ".." or Path(Path(source).parts[0]).is_dir():
        raise MissingFileError(
            f"{str(source)!r} does not exist; give a PEFT directory, a .safetensors file or a hub id"
        )
    repo, revision = hub["repo"], hub["revision"]
    from adapterbank.adapters.hub import fetch

    directory, weights = fetch(repo, revision, (WEIGHTS_FILE, PICKLE_FILE) if allow_pickle else (WEIGHTS_FILE,))
    return directory, repo.split("/")[1], weights


def _own_name(directory: Path) -> str:
    # "." has none, and a link's own name says more than its target's
    return Path(os.path.abspath(directory)).name


def _name(name: str | None, default: str, source: str | Path) -> str:
    if name is not None:
        return check_name(name)
    try:
        return check_name(default)
    except AdapterError as error:
        raise AdapterError(f"{str(source)!r} gives no usable name: {error}") from error


def _look_below(directory: Path, where: str) -> None:
    """PEFT puts every adapter but "default" one level below the directory it was told: say so."""
    below = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG_FILE}"))
    if below and not (directory / CONFIG_FILE).exists():
        raise MissingFileError(f"{where}: {directory} holds no {CONFIG_FILE}; did you mean {directory / below[0]}?")


def _weights_in(directory: Path, where: str) -> Path:
    for file in (WEIGHTS_FILE, PICKLE_FILE):
        if (directory / file).is_file():
            return directory / file
    raise MissingFileError(f"{where}: {directory} holds no {WEIGHTS_FILE}; was the adapter saved with save_pretrained?")


def _read_pickle(path: Path, where: str) -> TensorDict:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    # a broken or hostile pickle can raise anything, and every one of them means the same to the user
    except Exception as error:
        raise AdapterError(f"{where}: {path.name} can't be read as plain weights: {str(error)[:200]}") from error
    if not isinstance(tensors, dict):
        raise AdapterError(f"{where}: {path.name} holds a {type(tensors).__name__}, expected a state dict")
    return TensorDict(tensors, size=path.stat().st_size, sha256=digest)


def write_directory(directory: Path, config: Mapping[str, Any], tensors: dict[str, Tensor], where: str) -> None:
    """Write a PEFT directory so that nobody ever sees half of it.

    Args:
        directory: A new or empty directory, or one that holds nothing but an adapter, which is replaced.
        config: What to write as ``adapter_config.json``.
        tensors: The weights, by their names in the file.
        where: How errors call the adapter.

    Raises:
        AdapterError: If ``directory`` holds anything else, or can't be written.
    """
    # through links, so that a link to a directory is kept and its target replaced
    directory = Path(os.path.realpath(os.path.expanduser(directory)))
    try:
        _check_target(directory, where)
        directory.parent.mkdir(parents=True, exist_ok=True)
        # beside the target: a rename is atomic within one file system only
        temporary = directory.parent / f".{directory.name}.{secrets.token_hex(4)}.tmp"
        temporary.mkdir()
        try:
            save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
            (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            # safetensors lets only the owner read what it writes
            (temporary / WEIGHTS_FILE).chmod((temporary / CONFIG_FILE).stat().st_mode)
            for file in temporary.iterdir():
                _sync(file)
            _replace(temporary, directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AdapterError(f"{where} can't be written to {directory}: {reason}") from error


def _check_target(directory: Path, where: str) -> None:
    """Allow a new or empty directory, and one that holds an adapter and nothing that would be lost with it."""
    if not os.path.lexists(directory):
        return
    if not directory.is_dir():
        raise AdapterError(f"{where} can't be written to {directory}, which is a file; give a directory")
    found = {file.name for file in directory.iterdir()}
    others = found - {CONFIG_FILE, WEIGHTS_FILE}
    if found and (others or CONFIG_FILE not in found):
        raise AdapterError(
            f"{where} can't be written to {directory}: it holds {', '.join(sorted(others or found)[:3])}, which would "
            "be lost; give a new or empty directory"
        )


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _replace(temporary: Path, directory: Path) -> None:
    if not directory.exists() or not any(directory.iterdir()):
        os.replace(temporary, directory)  # an empty directory gives way
        return
    # two renames, because a full directory can't be replaced in one; a crash between them leaves the old one as *.old
    old = temporary.with_suffix(".old")
    os.replace(directory, old)
    try:
        os.replace(temporary, directory)
    except OSError:
        os.replace(old, directory)
        raise
    shutil.rmtree(old, ignore_errors=True)
