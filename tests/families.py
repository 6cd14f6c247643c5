"""Synthetic families of LoRA adapters in PEFT's format, and ways to damage one. Used by tests and benchmarks.

Per module all adapters of a cluster share ``U (d_out, k)`` and ``V (d_in, k)``; adapter i has the update
``scale_i * X Y^T`` with ``X = U C_i + noise`` and ``Y = V D_i + noise`` of rank r, stored in an arbitrary gauge as
``B = X G^-1``, ``A = G Y^T``. The update is the same whatever gauge or alpha was drawn.
"""

import json
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Family:
    """What a family looks like; the fields of a benchmark case go straight in."""

    n: int = 20
    rank: int = 16
    ranks: tuple[int, ...] = ()
    """Draw each adapter's rank from these instead."""
    hidden: int = 1024
    d_out: int | None = None
    layers: int = 24
    modules: tuple[str, ...] = ("q_proj", "v_proj")
    shared_rank: int = 32
    noise: float = 0.1
    """Frobenius norm of the unshared part of the update, relative to the shared part."""
    clusters: int = 1
    """Groups of adapters that share a subspace with each other only."""
    alpha: float = 32
    alphas: tuple[float, ...] = ()
    rslora: bool = False
    gauge: str = "balanced"
    """balanced, orthogonal, scale or random."""
    scale_sigma: float = 0.0
    """Spread of the updates' sizes: the standard deviation of their logarithm."""
    drop_layers: float = 0.0
    """Share of layers that each adapter misses."""
    classifier: int = 0
    """Number of classes of a task head; 0 for none."""
    dtype: str = "float32"
    base_model: str = "synthetic/base-1024"
    prefix: str = "adapter"
    seed: int = 0

    def rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *key])


def make_family(out: Path | str, family: Family | None = None, **fields: object) -> list[Path]:
    """Write a family below ``out`` and return its directories; ``fields`` are those of :class:`Family`."""
    family = family or Family(**fields)  # type: ignore[arg-type]
    shared = {place: _shared(family, *place) for place in _places(family)}
    groups = family.rng(0).integers(0, family.clusters, family.n)
    directories = []
    for i in range(family.n):
        directories.append(Path(out) / f"{family.prefix}_{i:03d}")
        _write_adapter(directories[-1], family, i, {p: shared[p] for p in shared if p[2] == groups[i]})
    return directories


def _places(family: Family) -> Iterator[tuple[int, int, int]]:
    for layer in range(family.layers):
        for module in range(len(family.modules)):
            for cluster in range(family.clusters):
                yield layer, module, cluster


def _shared(family: Family, *place: int) -> tuple[np.ndarray, np.ndarray]:
    rng, d_out = family.rng(1, *place), family.d_out or family.hidden
    return _orthonormal(rng, d_out, family.shared_rank), _orthonormal(rng, family.hidden, family.shared_rank)


def _write_adapter(directory: Path, family: Family, i: int, shared: dict[tuple[int, int, int], tuple]) -> None:
    rng = family.rng(2, i)
    r = int(rng.choice(family.ranks)) if family.ranks else family.rank
    alpha = float(rng.choice(family.alphas)) if family.alphas else family.alpha
    strength = float(np.exp(rng.normal(0, family.scale_sigma)))
    kept = [layer for layer in range(family.layers) if rng.random() >= family.drop_layers] or [0]
    tensors = {}
    for (layer, module, _), (U, V) in shared.items():
        if layer not in kept:
            continue
        rng = family.rng(3, i, layer, module)
        X, Y = _noisy(rng, U, r, family.noise), _noisy(rng, V, r, family.noise)
        # the update's Frobenius norm is that of a typical fine-tune of this width, whatever its rank
        norm = np.sqrt(np.sum((X.T @ X) * (Y.T @ Y)))
        scale = alpha / (np.sqrt(r) if family.rslora else r)
        size = np.sqrt(0.02 * strength * np.sqrt(len(X) * len(Y)) / 1024 / (norm * scale))
        G = _gauge(rng, r, family.gauge)
        key = f"base_model.model.model.layers.{layer}.self_attn.{family.modules[module]}"
        tensors[f"{key}.lora_A.weight"] = G @ (size * Y).T
        tensors[f"{key}.lora_B.weight"] = (size * X) @ np.linalg.inv(G)
    if family.classifier:
        tensors["base_model.model.score.weight"] = 0.02 * rng.standard_normal((family.classifier, family.hidden))
    dtype = getattr(torch, family.dtype)
    directory.mkdir(parents=True, exist_ok=True)
    save_file({k: torch.from_numpy(v).to(dtype).contiguous() for k, v in tensors.items()}, directory / WEIGHTS)
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if family.classifier else "CAUSAL_LM",
        "base_model_name_or_path": family.base_model,
        "r": r,
        "lora_alpha": alpha,
        "target_modules": list(family.modules),
        "layers_to_transform": kept if len(kept) < family.layers else None,
        "modules_to_save": ["score"] if family.classifier else None,
        "use_rslora": family.rslora,
        "inference_mode": True,
    }
    (directory / CONFIG).write_text(json.dumps(config, indent=1))


def _orthonormal(rng: np.random.Generator, d: int, k: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((d, k)))[0]


def _noisy(rng: np.random.Generator, basis: np.ndarray, r: int, noise: float) -> np.ndarray:
    X = basis @ rng.standard_normal((basis.shape[1], r))
    N = rng.standard_normal(X.shape)
    # both factors are disturbed, and their shares add up in squares
    return X + noise / np.sqrt(2) * np.linalg.norm(X) / np.linalg.norm(N) * N


def _gauge(rng: np.random.Generator, r: int, kind: str) -> np.ndarray:
    if kind == "balanced":
        return np.eye(r)
    if kind == "scale":
        return np.eye(r) * np.exp(rng.normal(0, 1.5))
    Q = _orthonormal(rng, r, r)
    if kind == "orthogonal":
        return Q
    if kind == "random":
        return Q @ np.diag(np.exp(rng.uniform(-1.5, 1.5, r))) @ _orthonormal(rng, r, r)
    raise ValueError(f"gauge {kind!r} is none of balanced, scale, orthogonal, random")


CORRUPTIONS = (
    "truncated", "nan", "inf", "shape", "base", "zero", "missing_b", "not_lora", "badjson", "transposed", "noconfig",
    "extra", "dora", "pickle", "promise",
)  # fmt: skip


def corrupt(source: Path, kind: str, target: Path) -> Path:
    """Copy a good adapter to ``target`` and damage the copy; ``kind`` is one of :data:`CORRUPTIONS`."""
    shutil.copytree(source, target)
    config_file, weights_file = target / CONFIG, target / WEIGHTS
    config, tensors = json.loads(config_file.read_text()), load_file(weights_file)
    keys = [key for key in sorted(tensors) if "lora_A" in key]
    if kind == "truncated":
        weights_file.write_bytes(weights_file.read_bytes()[: weights_file.stat().st_size // 2])
    elif kind == "promise":  # the header's first tensor claims a terabyte
        data = weights_file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header[keys[0]] |= {"shape": [2**20, 2**18], "data_offsets": [0, 2**40]}
        text = json.dumps(header).encode()
        weights_file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    elif kind == "badjson":
        config_file.write_text("{ not json")
    elif kind == "noconfig":
        config_file.unlink()
    elif kind == "pickle":
        weights_file.unlink()
        with (target / "adapter_model.bin").open("wb") as file:
            pickle.dump(print, file)
    elif kind in ("base", "not_lora", "dora"):
        field = {"base": "base_model_name_or_path", "not_lora": "peft_type", "dora": "use_dora"}[kind]
        config[field] = {"base": "other/base", "not_lora": "IA3", "dora": True}[kind]
        config_file.write_text(json.dumps(config))
    else:
        save_file(_damaged(tensors, keys, kind), weights_file)
    return target


def _damaged(tensors: dict[str, torch.Tensor], keys: list[str], kind: str) -> dict[str, torch.Tensor]:
    if kind in ("nan", "inf"):
        tensors[keys[0]][0, 0] = float(kind)
    elif kind == "zero":
        tensors = {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
    elif kind == "shape":  # another, narrower base
        tensors |= {key: tensors[key][:, ::2].contiguous() for key in keys}
    elif kind == "missing_b":
        del tensors[keys[0].replace("lora_A", "lora_B")]
    elif kind == "transposed":
        tensors = {key: tensor.T.contiguous() if "lora" in key else tensor for key, tensor in tensors.items()}
    elif kind == "extra":
        tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.ones(4, 100)
    else:
        raise ValueError(f"{kind!r} is none of {', '.join(CORRUPTIONS)}")
    return tensors
