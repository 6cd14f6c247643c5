"""Files that several processes change: a lock, and a replacement in one step."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock that a file stands for; the file is made, and stays. The system releases it when the process dies.

    Raises:
        OSError: If the file can't be opened.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(handle)
        yield
    finally:
        os.close(handle)


def _lock(handle: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt  # mypy, on other systems, finds nothing in it

        msvcrt.locking(handle, msvcrt.LK_LOCK, 1)  # type: ignore[attr-defined,unused-ignore]
    else:
        fcntl.flock(handle, fcntl.LOCK_EX)


def replace_file(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a file so that readers see the old or the new one, whatever moment the writer dies at.

    Args:
        path: The file.
        data: All of it.
        durable: Wait until it is on the disk.

    Raises:
        OSError: If it can't be written.
    """
    temporary = path.parent / f".{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
