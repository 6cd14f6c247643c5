"""Measured results: each ``cases/NAME.toml`` becomes ``results/NAME.json``, and the tables and pictures come from those."""
