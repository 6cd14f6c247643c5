"""A task that was trained in a bank, as its PEFT directory holds it: coefficients of each layer, and a task head."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapterbank.adapters.adapter import LoraAdapter
from adapterbank.adapters.factors import LoraFactors
from adapterbank.adapters.names import base_model_id
from adapterbank.adapters.peft_config import CONFIG_FILE, TASK_TYPE, peft_type
from adapterbank.adapters.peft_files import open_source
from adapterbank.adapters.peft_keys import PREFIX, WRAPPED
from adapterbank.adapters.tensors import TensorSource
from adapterbank.errors import AdapterError

WEIGHTS = {
    "eig_coef_A", "eig_coef_B", "eig_core", "eig_free_A", "eig_free_B", "eig_V", "eig_U", "eig_gradient_in",
    "eig_gradient_out",
}  # fmt: skip
LARGEST = 2**60
"""Number in a config that is believed."""
SAVED_BASIS = ("shared_V", "shared_U")
PACKED = ("eig_gradient_in", "eig_gradient_out")
TRAINED = ("coefficients", "core", "components", "head")
"""What a task trains; see ``EigenLoraConfig.train``."""
_KEPT = ("task_type", "auto_mapping", "revision", "modules_to_save")


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What of a trained task's config says how its weights become an update; fields as in ``EigenLoraConfig``."""

    r: int
    train: str
    scale: float
    k: int | None
    bank: str | None
    bank_fingerprint: str | None
    bank_members: int
    basis_probe: float | None
    free_rank: int
    random_directions: int
    base_directions: int
    gradient_directions: int
    gradient_bits: int
    seed: int
    use_mean: bool

    @classmethod
    def read(cls, config: Mapping[str, Any], where: str) -> "TaskConfig":
        """Check an ``adapter_config.json``.

        Raises:
            AdapterError: If a field is missing or impossible.
        """

        def field(name: str, kinds: tuple[type, ...], least: int = -LARGEST, default: Any = None) -> Any:
            value = config.get(name)
            if value is None:
                return default
            # type, because bool is an int to Python
            if type(value) not in kinds or (type(value) in (int, float) and not least <= value <= LARGEST):
                raise AdapterError(
                    f"{where}: {CONFIG_FILE} has {name}={ascii(value)[:40]}; the tuner never writes that"
                )
            return value

        r, train = field("r", (int,), 1), field("train", (str,), default="coefficients")
        if r is None:
            raise AdapterError(f"{where}: {CONFIG_FILE} has no r, so its coefficients mean nothing; copy it again")
        if train not in TRAINED:
            raise AdapterError(f"{where}: train={train[:40]!a} is unknown, expected one of {', '.join(TRAINED)}")
        alpha, probe = field("lora_alpha", (int, float)), field("basis_probe", (int, float))
        bits = field("gradient_bits", (int,), default=4)
        if bits not in (4, 8):
            raise AdapterError(f"{where}: gradient_bits={bits}, expected 4 or 8; copy {CONFIG_FILE} again")
        names = ("free_rank", "random_directions", "base_directions", "gradient_directions", "bank_members")
        counts = {name: field(name, (int,), 0, default=0) for name in names}
        return cls(
            r=r,
            train=train,
            scale=1.0 if alpha is None else float(alpha) / r,
            k=field("k", (int,), 0),
            bank=field("bank", (str,)),
            bank_fingerprint=field("bank_fingerprint", (str,)),
            basis_probe=None if probe is None else float(probe),
            gradient_bits=bits,
            seed=field("seed", (int,), default=0),
            use_mean=field("use_mean", (bool,), default=False),
            **counts,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedTask:
    """A task trained in a bank: an index of its weights. Which update they are, the bank says (``bank/joining.py``)."""

    name: str
    base: str | None
    config: TaskConfig
    layers: Mapping[str, Mapping[str, str]]
    """Names of the stored tensors, by layer and by weight, e.g. ``eig_coef_A``; sorted."""
    _kept: Mapping[str, Any]
    _extra_keys: Mapping[str, str]
    _source: TensorSource

    @classmethod
    def from_tensors(cls, name: str, config: Mapping[str, Any], source: TensorSource) -> "TrainedTask":
        """Sort the tensors of a file.

        Raises:
            AdapterError: If a name is of no known layout, or the config is none of a trained task.
        """
        where = f"task {name!r}"
        layers: dict[str, dict[str, str]] = {}
        extras: dict[str, str] = {}
        for key in sorted(source.entries):
            parts = key.removeprefix(PREFIX).split(".")
            at = next((i for i, part in enumerate(parts) if part.startswith(("eig_", "shared_"))), None)
            if at is None:
                if WRAPPED.intersection(parts):
                    raise AdapterError(
                        f"{where}: {key} belongs to a whole live model; save the task with save_pretrained"
                    )
                extras[".".join(parts)] = key
                continue
            weight, rest = parts[at], parts[at + 1 :]
            # a saved basis has its hash behind its name
            known = (weight in WEIGHTS and not rest) or (weight in SAVED_BASIS and len(rest) == 1)
            found = layers.setdefault(".".join(parts[:at]), {})
            if at == 0 or not known or weight in found:
                raise AdapterError(
                    f"{where}: {key} has an unknown layout, expected {PREFIX}<layer>.eig_coef_A; save the task again "
                    "with save_pretrained"
                )
            found[weight] = key
            packed = weight in PACKED
            if (source.entries[key].dtype == torch.uint8) != packed or not (
                packed or source.entries[key].dtype.is_floating_point
            ):
                raise AdapterError(
                    f"{where}: {key} holds {source.entries[key].dtype}, expected {'uint8' if packed else 'floats'}"
                )
        if not layers:
            raise AdapterError(f"{where}: it holds no coefficients; was it saved with save_pretrained?")
        base = config.get("base_model_name_or_path")
        return cls(
            name=name,
            base=base_model_id(base) if isinstance(base, str) else None,
            config=TaskConfig.read(config, where),
            layers=dict(sorted(layers.items())),
            _kept={key: config[key] for key in _KEPT if config.get(key) is not None},
            _extra_keys=extras,
            _source=source,
        )

    def shape(self, layer: str, weight: str) -> tuple[int, ...]:
        """Shape of a stored weight; nothing is read."""
        return self._source.entries[self.layers[layer][weight]].shape

    def read(self, layer: str, weight: str) -> Tensor:
        """A weight in float32; packed directions as they are."""
        stored = self._source.read(self.layers[layer][weight])
        return stored if weight in PACKED else stored.to(torch.float32)

    def as_lora(self, factors: Mapping[str, LoraFactors], base: str | None = None) -> LoraAdapter:
        """An ordinary adapter with these factors, and with the head, the name and the file of the task.

        Args:
            factors: By module.
            base: Id of the base model instead of the one that the task names.
        """
        extras = {extra: self._source.read(key) for extra, key in self._extra_keys.items()}
        return LoraAdapter.from_factors(
            self.name, factors, base=base or self.base, config=self._kept, extras=extras, origin=self._source
        )


def open_adapter(
    source: str | Path, *, name: str | None = None, allow_pickle: bool = False
) -> LoraAdapter | TrainedTask:
    """Open an adapter, or a task that was trained in a bank; arguments and errors as in :meth:`LoraAdapter.load`."""
    name, config, tensors = open_source(source, name=name, config=None, allow_pickle=allow_pickle)
    if peft_type(config) == TASK_TYPE:
        return TrainedTask.from_tensors(name, config, tensors)
    return LoraAdapter.from_tensors(name, config, tensors)
