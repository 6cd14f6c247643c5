"""The adapters of a case: real ones, trained by the demo's code and cached, or synthetic ones, written for the run."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tests.families import WEIGHTS, Family, make_family

from adapterbank.demo.assets import cache_dir
from adapterbank.demo.train import TrainSettings, train_adapter

REAL_TASKS = (
    "autos-motorcycles", "pc-mac", "tweets", "reuters-r8", "graphics-windows", "atheism-christian", "baseball-hockey",
    "rotten-tomatoes", "electronics-crypt", "guns-mideast", "med-space", "politics-religion",
)  # fmt: skip


@contextmanager
def written(fields: Mapping[str, Any], **changed: Any) -> Iterator[list[Path]]:
    """PEFT directories of a case's ``[family]``; synthetic ones are gone afterwards.

    Args:
        fields: ``source`` is ``real`` (with ``name``), or ``planted`` or ``same-init`` with fields of ``Family``.
        **changed: Fields to use instead.
    """
    fields = {**fields, **changed}
    source = fields.pop("source")
    if source == "real":
        yield [train_adapter(settings, path) for path, settings in real(fields["name"])]
        return
    lists = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    with tempfile.TemporaryDirectory(prefix="adapterbank-bench-") as scratch:
        if source == "same-init":
            yield _same_init(Path(scratch), drift=lists.pop("drift"), family=Family(**lists))
        elif source == "planted":
            yield make_family(scratch, Family(**lists))
        else:
            raise ValueError(f"family source {source!r} is none of real, planted, same-init")


def real(name: str) -> list[tuple[Path, TrainSettings]]:
    """Where the real adapters of a family lie in the cache, and how they were or will be trained.

    ``private``: 12 tasks, each with a random start of its own. ``oneseed``: 8 of them, all from one random start.
    """
    private = [TrainSettings(task=task, seed=i, init_seed=i + 1) for i, task in enumerate(REAL_TASKS)]
    if name not in ("private", "oneseed"):
        raise ValueError(f"real family {name!r} is neither private nor oneseed")
    oneseed = [replace(settings, seed=100 + settings.seed, init_seed=1000) for settings in private[:8]]
    return [(cache_dir() / "adapters" / name / s.task, s) for s in (private if name == "private" else oneseed)]


def _same_init(out: Path, drift: float, family: Family) -> list[Path]:
    """Unrelated adapters, but every A is one random matrix plus ``drift``: what one seed for all leaves behind."""
    directories = make_family(out, replace(family, shared_rank=family.hidden))
    start: dict[str, torch.Tensor] = {}
    for i, directory in enumerate(directories):
        tensors = load_file(directory / WEIGHTS)
        rng = np.random.default_rng([family.seed, 9, i])
        for key in sorted(k for k in tensors if "lora_A" in k):
            own = torch.from_numpy(rng.standard_normal(tensors[key].shape)).to(tensors[key])
            start.setdefault(key, own)
            size = tensors[key].norm() / own.norm()
            tensors[key] = size * (start[key] + drift * own) / (1 + drift**2) ** 0.5
        save_file(tensors, directory / WEIGHTS)
    return directories
