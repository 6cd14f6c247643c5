"""A bank's directory: files named by their content, and ``bank.json`` as the one commit point (docs/format.md).

Files are written before the index that names them, and the index is replaced in one step. So a reader sees the old
bank or the new one, whatever moment a writer dies at; what a dead writer left behind is swept by the next one.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from adapterbank.adapters import disk
from adapterbank.bank.index import BankIndex
from adapterbank.errors import BankError, MissingFileError

INDEX = "bank.json"
LOCK = ".lock"
_OURS = re.compile(r"(basis-)?[0-9a-f]{16}\.safetensors|\.[0-9a-f]{8}\.tmp")


def member_file(sha256: str) -> str:
    """File name of a member."""
    return f"{sha256[:16]}.safetensors"


def basis_file(sha256: str) -> str:
    """File name of the basis."""
    return f"basis-{sha256[:16]}.safetensors"


def serialise(tensors: Mapping[str, Tensor]) -> tuple[bytes, str]:
    """The bytes of a file and their sha256."""
    data = safetensors.torch.save(dict(tensors))
    return data, hashlib.sha256(data).hexdigest()


def read_index(directory: Path) -> BankIndex:
    """Read ``bank.json``.

    Raises:
        MissingFileError: If there is none.
        BankError: If it is damaged or of a newer format.
    """
    path = directory / INDEX
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingFileError(f"{directory} holds no {INDEX}; give the directory of a bank") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BankError(f"{path} can't be read: {error}") from error
    return BankIndex.from_json(text, str(path))


def read_file(directory: Path, name: str, sha256: str) -> dict[str, Tensor]:
    """Read a file of the bank and check its hash.

    Raises:
        MissingFileError: If it is gone.
        BankError: If it isn't what the index says.
    """
    data = read_bytes(directory, name, sha256)
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise BankError(f"{directory / name} is no safetensors file: {error}") from error


def read_bytes(directory: Path, name: str, sha256: str) -> bytes:
    """The bytes of a file of the bank, whose hash was checked; errors as of :func:`read_file`."""
    path = directory / name
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise gone(path) from error
    except OSError as error:
        raise BankError(f"{path} can't be read: {error.strerror or error}") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise BankError(f"{path} is damaged: its sha256 is not the one in {INDEX}; restore it from a copy")
    return data


def gone(path: Path) -> MissingFileError:
    """The error about a file that the index names and that isn't there."""
    return MissingFileError(
        f"{path} is gone: another process has changed the bank since it was opened, or the copy is incomplete; load it "
        "again, or copy it again"
    )


def write_file(directory: Path, name: str, data: bytes, sha256: str, *, durable: bool = True) -> None:
    """Write a file that the index does not name yet; one that is there and whole is left alone.

    Args:
        directory: Where to.
        name: Name of the file.
        data: Its content.
        sha256: Hash of the content.
        durable: Wait until the disk has it; needless for files that are copied again when the bank is saved.
    """
    path = directory / name
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        _replace(directory, name, data, durable)


def commit(directory: Path, index: BankIndex) -> None:
    """Make ``index`` the bank's state, then sweep what it does not name. The caller holds the lock."""
    _replace(directory, INDEX, index.to_json().encode())
    named = {basis_file(index.basis)} | {member_file(m.sha256) for m in index.members.values()}
    for path in directory.iterdir():
        if _OURS.fullmatch(path.name) and path.name not in named:
            path.unlink(missing_ok=True)


def check_free(directory: Path) -> None:
    """Refuse a directory that holds something, but no bank; what a writer that died has left is no reason.

    Raises:
        BankError: If there is a file in it that is none of a bank's.
    """
    strangers = [p.name for p in directory.iterdir() if p.name not in (INDEX, LOCK) and not _OURS.fullmatch(p.name)]
    if strangers and not (directory / INDEX).exists():
        raise BankError(f"{directory} holds {min(strangers)!r} and no bank; give a new or empty directory")


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the bank's writer lock, which the system releases when the process dies.

    Raises:
        BankError: If the directory can't be written to, or holds something other than a bank.
    """
    with ExitStack() as stack:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            check_free(directory)
            stack.enter_context(disk.locked(directory / LOCK))
        except OSError as error:
            raise BankError(f"{directory} can't be written to: {error.strerror or error}") from error
        yield


def _replace(directory: Path, name: str, data: bytes, durable: bool = True) -> None:
    try:
        disk.replace_file(directory / name, data, durable=durable)
    except OSError as error:
        raise BankError(f"{directory / name} can't be written: {error.strerror or error}") from error
