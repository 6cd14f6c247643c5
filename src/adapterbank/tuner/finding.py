"""The bank that a config means: by argument, environment, place or hub id."""

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from adapterbank.adapters.peft_files import HUB_ID
from adapterbank.bank import Bank
from adapterbank.bank.shared_basis import BankBasis
from adapterbank.errors import BankError, MissingFileError
from adapterbank.tuner.config import EigenLoraConfig

VARIABLE = "ADAPTERBANK_BANK"


def find_basis(config: EigenLoraConfig) -> tuple[Bank, BankBasis]:
    """The bank of a config, and the basis that its coefficients mean; the config learns the fingerprint.

    Raises:
        MissingFileError: If no bank is found; the message says where was looked.
        BankError: If there are only other banks, or it can't give the basis.
    """
    where = f"the adapter at {config.origin}" if config.origin else "the adapter"
    looked: list[str] = []
    wrong: BankError | None = None
    for place, bank in _banks(config, looked):
        try:
            # a config that is not out of a file takes the bank as it is now
            basis = bank.basis(config.k, members=config.bank_members if config.is_saved else None)
            if config.is_saved:
                basis.check(config.bank_fingerprint, config.basis_probe, where)
        except BankError as error:
            if not config.is_saved:
                raise
            wrong = wrong or BankError(f"{place}: {error}")
            continue
        config.bank_fingerprint, config.bank_members = basis.fingerprint, basis.members
        config.basis_probe = basis.probe
        return bank, basis
    if wrong is not None:
        raise wrong
    raise MissingFileError(_missing(config, looked))


def _banks(config: EigenLoraConfig, looked: list[str]) -> Iterator[tuple[str, Bank]]:
    if isinstance(config.bank, Bank):
        yield "the bank given", config.bank
        return
    for path in _places(config):
        looked.append(str(path))
        if (path / "bank.json").is_file():
            yield str(path), open_bank(path)
    name = config.bank
    if isinstance(name, str) and HUB_ID.fullmatch(name) and not Path(name).exists():
        looked.append(f"{name} on the hub")
        found = _fetch(name)
        if found is not None:
            yield name, open_bank(found)


def _places(config: EigenLoraConfig) -> Iterator[Path]:
    if config.bank:
        yield Path(config.bank).expanduser()
        if config.is_given:
            return  # a mistyped path must not lead to another bank
    name = Path(config.bank).name if config.bank else "bank"
    for entry in os.environ.get(VARIABLE, "").split(os.pathsep):
        if entry:
            yield Path(entry).expanduser()
            yield Path(entry).expanduser() / name
    if config.origin:
        here = Path(config.origin).absolute()
        for directory in (here, here.parent):
            yield from dict.fromkeys((directory / name, directory / "bank", directory))


def _fetch(name: str) -> Path | None:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        return None
    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "bank.json"]))
    except (OSError, HfHubHTTPError, ValueError):
        return None


def open_bank(path: Path) -> Bank:
    """A bank, opened once as long as its index stays the same: its derived basis is worth keeping."""
    found = (path / "bank.json").resolve()
    state = found.stat()
    return _opened(found.parent, state.st_mtime_ns, state.st_size)


def as_bank(bank: Bank | str | os.PathLike[str]) -> Bank:
    """An open bank, or the one in a directory."""
    if isinstance(bank, Bank):
        return bank
    path = Path(bank).expanduser()
    return open_bank(path) if (path / "bank.json").is_file() else Bank.load(path)  # which says what is missing


@lru_cache(maxsize=4)
def _opened(directory: Path, changed: int, size: int) -> Bank:
    return Bank.load(directory)


def _missing(config: EigenLoraConfig, looked: list[str]) -> str:
    places = ", ".join(dict.fromkeys(looked)) or "nowhere to look"
    if config.is_given or not config.is_saved:
        given = f"there is no bank at {places}" if config.bank else f"EigenLoraConfig needs a bank ({places})"
        return f"{given}; give bank=DIRECTORY, a Bank or a hub id, or set {VARIABLE}"
    return (
        f"the bank {config.bank or 'of unknown name'!r}, basis {config.bank_fingerprint} was not found ({places}); "
        f"pass bank= to adapterbank.tuner.load, or set {VARIABLE} to its directory"
    )
