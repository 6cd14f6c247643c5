"""Measured results: ``cases/NAME.toml`` becomes ``results/NAME.json``, and tables and pictures come from that."""
