"""Sparse adapters on disk: our own directories, and PEFT's SHiRA and Super-Tuning in and out.

A directory of ours is PEFT's layout: ``adapter_config.json`` and ``adapter_model.safetensors`` with
``base_model.model.<module>.sparse_positions`` (flat int32 or int64), ``.sparse_values`` (16 or 32 bits) and
``.sparse_fingerprint`` (hashes of the base model's values there).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapterbank.adapters.names import base_model_id, match_modules
from adapterbank.adapters.peft_config import peft_type
from adapterbank.adapters.peft_files import open_source, write_directory
from adapterbank.adapters.peft_keys import PREFIX, WRAPPED
from adapterbank.adapters.tensors import TensorSource
from adapterbank.errors import AdapterError
from adapterbank.shira.delta import Model, SparseDelta, SparseUpdate, tensors_of
from adapterbank.shira.fingerprint import read_fingerprint

TYPE = "SPARSE_SHIRA"
"""``peft_type`` of our own files."""
KEPT = ("task_type", "auto_mapping", "revision", "modules_to_save", "fan_in_fan_out", "calibration")
"""What a PEFT config says that stays with an adapter, whatever its kind."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Names of a file's tensors."""

    positions: str
    values: str
    fingerprint: str | None = None
    """Of the base; int64, ``(3,)``."""


LAYOUTS = {
    TYPE: _Layout(positions="sparse_positions", values="sparse_values", fingerprint="sparse_fingerprint"),
    "SHIRA": _Layout(positions="shira_indices", values="shira_weight"),
    "SUPERTUNING": _Layout(positions="supertuning_indices", values="supertuning_values"),
}


# --- reading ----------------------------------------------------------------------------------------------------------


def load(
    source: str | Path | Mapping[str, Tensor],
    *,
    name: str | None = None,
    model: Model | None = None,
    config: Mapping[str, Any] | None = None,
    allow_pickle: bool = False,
) -> SparseDelta:
    """Open a sparse adapter: ours, or PEFT's SHiRA or Super-Tuning.

    Args:
        source: Directory, file, hub id, or a state dict.
        name: Of the adapter; by default that of the directory.
        model: The base model, or its parameters by name. PEFT's files don't say how large layers are, so they need it.
        config: In the place of the ``adapter_config.json``; a state dict needs it.
        allow_pickle: Read a ``.bin`` file, restricted to plain weights.

    Raises:
        MissingFileError: If there is nothing there.
        AdapterError: If it is no sparse adapter, is damaged, or needs ``model``.
    """
    if isinstance(source, Mapping) and config is None:
        raise AdapterError("a state dict doesn't say what it is; pass config=, as adapter_config.json has it")
    name, config, tensors = open_source(source, name=name, config=config, allow_pickle=allow_pickle)
    where, kind = f"adapter {name!r}", peft_type(config)
    if kind not in LAYOUTS:
        raise AdapterError(f"{where}: its peft_type is {kind[:40]!r}, expected {', '.join(LAYOUTS)}")
    layers, extras = _sorted(tensors, LAYOUTS[kind], where)
    weights = None if model is None else tensors_of(model)
    updates = {}
    for layer, keys in layers.items():
        parameter = f"{layer}.weight"
        shape = _shape_of(config, layer, where) if kind == TYPE else _shape_in(weights, parameter, where)
        positions, values = tensors.read(keys["positions"]), tensors.read(keys["values"])
        try:
            updates[parameter] = _update(kind, positions, values, shape)
            if "fingerprint" in keys:
                known = read_fingerprint(tensors.read(keys["fingerprint"]))
                updates[parameter] = replace(updates[parameter], fingerprint=known)
        except AdapterError as error:
            raise AdapterError(f"{where}, {parameter}: {error}") from error
    base = config.get("base_model_name_or_path")
    return SparseDelta(
        name=name,
        updates=updates,
        base=base_model_id(base) if isinstance(base, str) else None,
        mask=_mask_of(kind, config),
        seed=config["seed"] if type(config.get("seed")) is int else None,
        extras={extra: tensors.read(key) for extra, key in extras.items()},
        config={key: config[key] for key in KEPT if config.get(key) is not None},
    )


def _sorted(tensors: TensorSource, layout: _Layout, where: str) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Keys of each layer's two tensors, and of what was trained whole."""
    layers, extras = dict[str, dict[str, str]](), dict[str, str]()
    roles = {layout.positions: "positions", layout.values: "values", layout.fingerprint: "fingerprint"}
    adapted = {key.removeprefix(PREFIX).rpartition(".")[0] for key in tensors.entries if key.endswith(layout.values)}
    for key in sorted(tensors.entries):
        layer, _, last = key.removeprefix(PREFIX).rpartition(".")
        if last in roles and layer:
            layers.setdefault(layer, {})[roles[last]] = key
        elif ".sparse_dora." in key:
            raise AdapterError(
                f"{where}: it is a DoRA in training; load it with PeftModel, and take SparseDelta.from_peft of that"
            )
        elif layer.endswith(".base_layer") and layer.removesuffix(".base_layer") in adapted:
            continue  # PEFT saves the base layer of an adapted lm_head too
        elif last.startswith(("sparse_", "shira_", "supertuning_")) or "supertuning_lora" in key:
            raise AdapterError(
                f"{where}: {key} is no part of a plain sparse adapter (Super-Tuning with r= also has a LoRA); train "
                "without it"
            )
        elif WRAPPED.intersection(key.split(".")):
            raise AdapterError(f"{where}: {key} belongs to a whole live model; save it with save_pretrained")
        else:
            extras[key.removeprefix(PREFIX)] = key
    if not layers:
        raise AdapterError(f"{where}: it holds no {layout.values}; was it saved with save_pretrained?")
    for layer, keys in layers.items():
        if lacking := {"positions", "values"} - keys.keys():
            raise AdapterError(
                f"{where}: {layer} has no {lacking.pop()}; save it again (Super-Tuning: save_precomputed_indices=True)"
            )
    return layers, extras


def _update(kind: str, positions: Tensor, values: Tensor, shape: tuple[int, int]) -> SparseUpdate:
    if kind == "SHIRA":  # (2, nnz): row and column
        if positions.ndim != 2 or len(positions) != 2:
            raise AdapterError(f"positions are {tuple(positions.shape)}, expected (2, nnz); copy the file again")
        if not bool(((positions >= 0) & (positions < torch.tensor(shape)[:, None])).all()):
            raise AdapterError(f"rows and columns reach outside of {shape}; is this another base model?")
        positions = positions[0].long() * shape[1] + positions[1].long()
    return SparseUpdate.of(positions, values, shape)


def _shape_of(config: Mapping[str, Any], layer: str, where: str) -> tuple[int, int]:
    shapes = config.get("shapes")
    shape = shapes.get(layer) if isinstance(shapes, dict) else None
    natural = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 2**31 for n in shape)
    if not natural or not isinstance(shape, list):
        raise AdapterError(f"{where}: its config says no shape of {layer}; copy adapter_config.json again")
    return shape[0], shape[1]


def _shape_in(weights: Mapping[str, Tensor] | None, parameter: str, where: str) -> tuple[int, int]:
    if weights is None:
        raise AdapterError(f"{where}: PEFT's files don't say how large a layer is; pass model=, the base model")
    place = match_modules([parameter], weights).get(parameter)
    if place is None or weights[place].ndim != 2:
        raise AdapterError(f"{where}: the model has no matrix {parameter}; is it the base of this adapter?")
    return int(weights[place].shape[0]), int(weights[place].shape[1])


def _mask_of(kind: str, config: Mapping[str, Any]) -> str | None:
    if kind == "SUPERTUNING":
        return "wm"
    word = config.get("mask" if kind == TYPE else "mask_type")
    return word if isinstance(word, str) else None


# --- writing ----------------------------------------------------------------------------------------------------------


def save(delta: SparseDelta, directory: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write a directory of ours, all or nothing: 6 bytes a value in 16 bits, 8 in 32.

    Args:
        delta: The adapter.
        directory: A new or empty directory, or one that holds nothing but an adapter, which is replaced.
        dtype: Of the values; by default float16 or bfloat16, whichever is nearer to them.

    Raises:
        AdapterError: If it changes no layer, a value doesn't fit the type, or the directory can't be written.
    """
    updates = _by_layer(delta)
    tensors = _tensors(delta, LAYOUTS[TYPE], _nearest(delta) if dtype is None else dtype)
    config = _config(delta, TYPE) | {
        "density": delta.density,
        "mask": delta.mask,
        "seed": delta.seed or 0,
        "is_saved": True,
        "shapes": {layer: list(update.shape) for layer, update in updates.items()},
        "counts": {layer: len(update.positions) for layer, update in updates.items()},
    }
    write_directory(Path(directory), config, tensors, f"adapter {delta.name!r}")


def save_as_shira(delta: SparseDelta, directory: str | Path) -> None:
    """Write a checkpoint of PEFT's SHiRA: 12 bytes a value.

    Raises:
        AdapterError: If the counts aren't ``r (d_in + d_out)`` for one ``r``, which PEFT asks for, or the layers are
            GPT-2's Conv1D, which it doesn't take.
    """
    updates = _linears(delta)
    ranks = {layer: len(u.positions) / sum(u.shape) for layer, u in updates.items()}
    r = next(iter(ranks.values()), 0.0)
    for layer, rank in ranks.items():
        if rank != r or not r.is_integer() or not r:
            raise AdapterError(
                f"adapter {delta.name!r}: PEFT's SHiRA holds r (d_in + d_out) values in every layer, {layer} has "
                f"{len(updates[layer].positions)}: r would be {rank:.3f}; choose the density so, or save_as_supertuning"
            )
    tensors = _tensors(delta, LAYOUTS["SHIRA"], torch.float32)
    for layer, update in updates.items():
        rows = update.positions.long() // update.shape[1]
        pairs = torch.stack([rows, update.positions.long() - rows * update.shape[1]]).to(torch.int32)
        tensors[f"{PREFIX}{layer}.shira_indices"] = pairs
    # any other word than "random" has PEFT take the positions from the file
    config = _config(delta, "SHIRA") | {"r": int(r), "mask_type": delta.mask or "custom", "fan_in_fan_out": False}
    write_directory(Path(directory), config, tensors, f"adapter {delta.name!r}")


def save_as_supertuning(delta: SparseDelta, directory: str | Path) -> None:
    """Write a checkpoint of PEFT's Super-Tuning: 8 bytes a value.

    Raises:
        AdapterError: If no one sparsity gives the counts of all layers, a layer has no values or is too large for
            int32, or the layers are GPT-2's Conv1D, which PEFT doesn't take here.
    """
    updates = _linears(delta)
    sizes = [(len(u.positions), u.shape[0] * u.shape[1]) for u in updates.values()]
    if not all(count for count, _ in sizes):
        raise AdapterError(f"adapter {delta.name!r}: a layer has no values, which PEFT's Super-Tuning doesn't take")
    # PEFT keeps int(total * (1 - sparsity)) values
    least, most = max(count / total for count, total in sizes), min((count + 1) / total for count, total in sizes)
    sparsity = 1 - (least + most) / 2
    if any(int(total * (1 - sparsity)) != count for count, total in sizes):
        raise AdapterError(
            f"adapter {delta.name!r}: PEFT's Super-Tuning has one sparsity for all layers, and none gives the counts "
            "of this one; choose one density for all"
        )
    tensors = _tensors(delta, LAYOUTS["SUPERTUNING"], torch.float32)
    if any(tensor.dtype == torch.int64 for tensor in tensors.values()):
        raise AdapterError(f"adapter {delta.name!r}: a layer has more positions than PEFT's int32 reaches")
    config = _config(delta, "SUPERTUNING") | {"sparsity": sparsity, "save_precomputed_indices": True}
    write_directory(Path(directory), config, tensors, f"adapter {delta.name!r}")


def _linears(delta: SparseDelta) -> dict[str, SparseUpdate]:
    if delta.config.get("fan_in_fan_out"):
        raise AdapterError(
            f"adapter {delta.name!r}: its layers are GPT-2's Conv1D, which PEFT's SHiRA and Super-Tuning don't take; "
            "save it as it is, or make a LoRA of it"
        )
    return _by_layer(delta)


def _by_layer(delta: SparseDelta) -> dict[str, SparseUpdate]:
    if not delta.updates:
        raise AdapterError(f"adapter {delta.name!r} changes nothing; there is nothing to write")
    for parameter in delta.updates:
        if not parameter.endswith(".weight"):
            raise AdapterError(f"adapter {delta.name!r}: {parameter} is no layer's weight, so PEFT has no name for it")
    return {parameter.removesuffix(".weight"): update for parameter, update in delta.updates.items()}


def _tensors(delta: SparseDelta, layout: _Layout, dtype: torch.dtype) -> dict[str, Tensor]:
    if dtype not in DTYPES:
        raise AdapterError(f"adapter {delta.name!r}: values are stored as {', '.join(map(str, DTYPES))}, not {dtype}")
    found = {PREFIX + name: tensor for name, tensor in delta.extras.items()}
    for layer, update in _by_layer(delta).items():
        stored = update.values.to(dtype)
        if not bool(stored.isfinite().all()):
            most = float(update.values.abs().max())
            raise AdapterError(
                f"adapter {delta.name!r}, {layer}: values reach {most:.3g}, too large for {dtype}; write bfloat16 or "
                "float32"
            )
        found[f"{PREFIX}{layer}.{layout.positions}"] = update.positions
        found[f"{PREFIX}{layer}.{layout.values}"] = stored
        if layout.fingerprint:
            found[f"{PREFIX}{layer}.{layout.fingerprint}"] = torch.tensor(update.fingerprint or [0] * 3)
    return found


def _nearest(delta: SparseDelta) -> torch.dtype:
    """The 16-bit type that changes the values least."""

    def lost(dtype: torch.dtype) -> float:
        every = (update.values.float() for update in delta.updates.values())
        return sum(float((values.to(dtype).float() - values).square().sum()) for values in every)

    # float16 loses infinitely much where it overflows
    return torch.float16 if lost(torch.float16) <= lost(torch.bfloat16) else torch.bfloat16


def _config(delta: SparseDelta, kind: str) -> dict[str, Any]:
    return {
        **delta.config,
        "peft_type": kind,
        "base_model_name_or_path": delta.base,
        "target_modules": sorted(_by_layer(delta)),
        "inference_mode": True,
    }
