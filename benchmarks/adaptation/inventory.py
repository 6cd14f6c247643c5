"""What a bank of the study holds, in how many bytes, and how much its members share."""

import time
from dataclasses import asdict, dataclass
from typing import Any

from adapterbank.adapters import LoraAdapter
from adapterbank.bank import Bank
from benchmarks.adaptation.runs import key_of
from benchmarks.adaptation.sources import Recycled
from benchmarks.adaptation.spectrum import spectrum, turned


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
        """Members, bytes, the error of the members, and their spectrum, and that of random directions."""
        start = time.process_time()
        held = Bank.load(self.sources.bank()).summary()
        adapters = [LoraAdapter.load(source.train()) for source in self.sources.sources]
        return {
            **{name: held[name] for name in ("adapters", "bytes", "source_bytes", "error")},
            "spectrum": spectrum(adapters),
            "turned": spectrum(turned(adapters)),
            "cpu_seconds": time.process_time() - start,
        }

    def told(self, result: dict[str, Any]) -> str:
        """See ``Job``."""
        return f"{self.subject}: {result['adapters']} adapters in {result['bytes']:,} bytes"
