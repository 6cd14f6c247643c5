"""SHiRA (arXiv:2406.13175): an adapter as one or two per cent of the base weights, changed in place.

``ShiraTunerConfig``, ``calibrate`` and ``optimizer_groups`` need PEFT, and make the method known to it when they're
first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from adapterbank.shira import masks
from adapterbank.shira.advice import Room, crowding, room
from adapterbank.shira.delta import SparseDelta, SparseUpdate
from adapterbank.shira.files import save_as_shira, save_as_supertuning
from adapterbank.shira.fusion import Interference, awom, awor, distances, fuse, interference, overlaps
from adapterbank.shira.hooks import MaskedGradients, mask_gradients
from adapterbank.shira.pictures import draw_masks, draw_matrices
from adapterbank.shira.switch import Switcher

if TYPE_CHECKING:
    from adapterbank.shira.tuner import ShiraTunerConfig, calibrate, optimizer_groups

__all__ = [
    "Interference",
    "MaskedGradients",
    "Room",
    "ShiraTunerConfig",
    "SparseDelta",
    "SparseUpdate",
    "Switcher",
    "awom",
    "awor",
    "calibrate",
    "crowding",
    "distances",
    "draw_masks",
    "draw_matrices",
    "fuse",
    "interference",
    "mask_gradients",
    "masks",
    "optimizer_groups",
    "overlaps",
    "room",
    "save_as_shira",
    "save_as_supertuning",
]


def __getattr__(name: str) -> Any:
    if name in ("ShiraTunerConfig", "calibrate", "optimizer_groups"):
        return getattr(importlib.import_module("adapterbank.shira.tuner"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
