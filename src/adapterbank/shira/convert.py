"""Other adapters as sparse ones, and back: the largest entries of an update, or its best low-rank approximation."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from adapterbank.adapters import LoraAdapter, LoraFactors
from adapterbank.errors import AdapterError
from adapterbank.shira.delta import SparseDelta
from adapterbank.shira.files import KEPT
from adapterbank.shira.masks import wm


def from_dense(
    updates: Mapping[str, Float[Tensor, "_ _"]], density: float, *, name: str = "adapter", **fields: Any
) -> tuple[SparseDelta, dict[str, float]]:
    """Keep the largest entries of dense updates, layer by layer: the best of so many, in the Frobenius norm.

    Args:
        updates: By parameter name.
        density: Share of each to keep.
        name: Of the adapter.
        fields: As in ``SparseDelta.from_tensors``.

    Returns:
        The adapter, and the share of each update's energy that is kept.
    """
    tensors, kept = {}, {}
    for parameter, update in updates.items():
        positions = wm(update, density)
        values = update.detach().float().cpu().flatten()[positions.long()]
        tensors[parameter] = positions, values
        energy = float(update.double().square().sum())
        kept[parameter] = float(values.double().square().sum()) / energy if energy else 1.0
    shapes = {parameter: (int(u.shape[0]), int(u.shape[1])) for parameter, u in updates.items()}
    return SparseDelta.from_tensors(tensors, shapes, name=name, **{"mask": "largest of the update", **fields}), kept


def from_lora(adapter: LoraAdapter, density: float) -> tuple[SparseDelta, dict[str, float]]:
    """A LoRA's largest entries; its task head comes along. Returns as :func:`from_dense`."""
    # PEFT's flag for GPT-2's Conv1D, which stores its weight as (d_in, d_out)
    transposed = bool(adapter.config.get("fan_in_fan_out"))
    updates = {f"{module}.weight": adapter.factors(module).update() for module in adapter.modules}
    extras = {extra: adapter.extra(extra) for extra in adapter.extra_names}
    kept = {key: adapter.config[key] for key in KEPT if adapter.config.get(key)}
    if transposed:
        updates = {parameter: update.T.contiguous() for parameter, update in updates.items()}
    return from_dense(updates, density, name=adapter.name, base=adapter.base, extras=extras, config=kept)


def to_lora(delta: SparseDelta, r: int, *, fan_in_fan_out: bool | None = None) -> tuple[LoraAdapter, dict[str, float]]:
    """The nearest LoRA of a rank (Eckart-Young).

    Args:
        delta: The adapter.
        r: Its rank.
        fan_in_fan_out: Whether the parameters are stored as ``(d_in, d_out)``, which GPT-2's Conv1D does; by default
            what the adapter says.

    Returns:
        The LoRA, and the relative error of each update: ``sqrt(sum of the further squared singular values)`` over the
        update's norm. Sparse updates are of high rank, so these are large.

    Raises:
        AdapterError: If ``r`` is more than a layer has.
    """
    config = dict(delta.config)
    if fan_in_fan_out is not None:
        config["fan_in_fan_out"] = fan_in_fan_out
    factors, errors = {}, {}
    for parameter, update in delta.updates.items():
        module = parameter.removesuffix(".weight")
        if not 1 <= r <= min(update.shape):
            raise AdapterError(f"adapter {delta.name!r}: r={r} is no rank of {parameter}, which is {update.shape}")
        dense = update.dense().float()
        A, B, errors[parameter] = _nearest(dense.T if config.get("fan_in_fan_out") else dense, r)
        factors[module] = LoraFactors(A=A, B=B, scale=1.0)
    lora = LoraAdapter.from_factors(delta.name, factors, base=delta.base, config=config, extras=dict(delta.extras))
    return lora, errors


def _nearest(dense: Float[Tensor, "d_out d_in"], r: int) -> tuple[Tensor, Tensor, float]:
    U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
    root, energy = S[:r].sqrt(), float(S.double().square().sum())
    error = (float(S[r:].double().square().sum()) / energy) ** 0.5 if energy else 0.0
    return root[:, None] * Vh[:r], U[:, :r] * root, error
