"""Many adapters in one process and one batch."""

from adapterbank.runtime.engine import AdapterEngine, Report

__all__ = ["AdapterEngine", "Report"]
