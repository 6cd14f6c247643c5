"""Where the files of changes wait that are not saved yet."""

import shutil
import tempfile
import weakref
from functools import cached_property
from pathlib import Path


class Staging:
    """A directory for the files of changes that are not saved yet; made on first use, gone with the object."""

    @cached_property
    def path(self) -> Path:
        """The directory."""
        made = Path(tempfile.mkdtemp(prefix="adapterbank-"))
        # TemporaryDirectory would do the same, with a warning
        weakref.finalize(self, shutil.rmtree, made, ignore_errors=True)
        return made

    def is_at(self, directory: Path) -> bool:
        """Whether this is it."""
        return "path" in self.__dict__ and self.path == directory

    def holds(self, name: str) -> bool:
        """Whether a file is in it."""
        return "path" in self.__dict__ and (self.path / name).exists()
