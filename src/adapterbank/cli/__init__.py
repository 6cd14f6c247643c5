"""The command ``adapterbank``: one public call per command. Importing it does not import torch."""

from adapterbank.cli import changing, demo, fitting, looking
from adapterbank.cli.app import app, main

__all__ = ["app", "changing", "demo", "fitting", "looking", "main"]
