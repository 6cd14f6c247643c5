"""Directions of the base weight are computed again on loading: are they still the ones that were trained on?"""

import math
from collections.abc import Mapping

from adapterbank.errors import BankError
from adapterbank.subspace.completion import probe
from adapterbank.tuner.config import EigenLoraConfig
from adapterbank.tuner.layer import EigenLoraLayer

TOLERANCE = 0.03
"""Mean turn of a direction, in radians, about: bf16 weights stay below a tenth of it, 4-bit ones go far beyond."""


def check_base_directions(config: EigenLoraConfig, layers: Mapping[str, EigenLoraLayer], adapter_name: str) -> None:
    """Remember a new adapter's directions by one number, and compare a loaded one's with it.

    Args:
        config: Of the adapter; learns ``base_probe``.
        layers: Layers that have it.
        adapter_name: Which adapter.

    Raises:
        BankError: If the base weights give other directions.
    """
    if not config.base_directions or any(layer.basis_of[adapter_name].is_own for layer in layers.values()):
        return
    found = _probe(config, layers, adapter_name)
    trained = config.base_probe if config.is_saved else None
    if trained is not None and not math.isclose(found, trained, abs_tol=TOLERANCE):
        raise BankError(
            "the adapter's base_directions were computed from other base weights, e.g. of another precision: load the "
            "base model as it was trained, or train with save_basis=True"
        )
    config.base_probe = found


def _probe(config: EigenLoraConfig, layers: Mapping[str, EigenLoraLayer], adapter_name: str) -> float:
    total, count = 0.0, 0
    for i, (_, layer) in enumerate(sorted(layers.items())):
        basis = layer.basis_of[adapter_name]
        for rows in (basis.V[: basis.k[0]], basis.U[:, : basis.k[1]].T):
            # after the bank's own directions, before the random ones
            end = len(rows) - config.random_directions
            total += probe(rows[end - config.base_directions : end], float(i), float(2 * i))
            count += config.base_directions
    return total / math.sqrt(max(count, 1))
