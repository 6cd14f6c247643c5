"""What a bank of the study holds, and in how many bytes."""

import time
from dataclasses import asdict, dataclass
from typing import Any

from adapterbank.bank import Bank
from benchmarks.adaptation.runs import key_of
from benchmarks.adaptation.sources import Recycled


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """A ``Job``: measure a bank."""

    part: str
    subject: str
    sources: Recycled

    @property
    def key(self) -> str:
        """See ``Job``."""
        return key_of(asdict(self))

    def execute(self) -> dict[str, Any]:
        """Members, bytes and the error of the members."""
        start = time.process_time()
        held = Bank.load(self.sources.bank()).summary()
        kept = {name: held[name] for name in ("adapters", "bytes", "source_bytes", "error")}
        return {**kept, "cpu_seconds": time.process_time() - start}

    def told(self, result: dict[str, Any]) -> str:
        """See ``Job``."""
        return f"{self.subject}: {result['adapters']} adapters in {result['bytes']:,} bytes"
