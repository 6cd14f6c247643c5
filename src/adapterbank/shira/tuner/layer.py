"""A linear layer of which some weights are trained, as a PEFT tuner layer."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapterbank.errors import AdapterBankError, AdapterError
from adapterbank.peft_scaling import ScaledAdapters
from adapterbank.shira import masks
from adapterbank.shira.delta import (
    FLOATS,
    changed,
    gathered,
    put_,
)
from adapterbank.shira.fingerprint import Fingerprint, check_fingerprint, fingerprint_of, read_fingerprint
from adapterbank.shira.tuner.config import ShiraTunerConfig
from adapterbank.shira.tuner.dora import MaskedDora
from adapterbank.shira.tuner.ops import sparse_linear


class SparseLayer(ScaledAdapters, BaseTunerLayer):
    """``y = (W + S) x + b``: of ``S`` a few values are trained, at fixed positions; ``W`` is the base model's.

    The values are parameters, or a DoRA's at these positions (:class:`adapterbank.shira.tuner.dora.MaskedDora`).
    """

    adapter_layer_names: tuple[str, ...] = ("sparse_values", "sparse_dora")
    other_param_names: tuple[str, ...] = (
        "sparse_positions", "sparse_fingerprint", "scaling", "initial_scaling", "unchecked",
    )  # fmt: skip

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        """Wrap a ``Linear`` or GPT-2's ``Conv1D``.

        Raises:
            AdapterBankError: If it is another layer, or its weight is no dense floating-point tensor of its own.
        """
        self.base_layer = base_layer
        inner, weight = self.get_base_layer(), getattr(self.get_base_layer(), "weight", None)
        self.is_conv1d = isinstance(inner, Conv1D)
        if not isinstance(inner, (nn.Linear, Conv1D)) or not isinstance(weight, Tensor):
            raise AdapterBankError(f"{type(inner).__name__} is no linear layer; sparse adapters change those only")
        if weight.dtype not in FLOATS or not weight.is_contiguous():
            raise AdapterBankError(
                f"the weight of {type(inner).__name__} is {weight.dtype} with strides {weight.stride()}: it can't be "
                "changed in place; load the base model unquantised"
            )
        rows, columns = weight.shape
        self.in_features, self.out_features = (rows, columns) if self.is_conv1d else (columns, rows)
        self.sparse_values = nn.ParameterDict()
        self.sparse_dora = nn.ModuleDict()
        self.sparse_positions = BufferDict(persistent=True)
        self.sparse_fingerprint = BufferDict(persistent=True)
        """Of the base that an adapter was loaded or last saved with; zeros before."""
        self.scaling: dict[str, float] = {}
        self.initial_scaling: dict[str, float] = {}
        self.unchecked: dict[str, bool] = {}
        """Saved adapters that were not looked at yet."""
        self.merged_adapters: list[str] = []
        self._overwritten = BufferDict()
        """What merged adapters have overwritten: buffers, so that it follows the weight to other types and devices."""
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight, as the base layer has it."""
        rows, columns = self.get_base_layer().weight.shape
        return int(rows), int(columns)

    def update_layer(self, adapter_name: str, config: ShiraTunerConfig, key: str) -> None:
        """Add an adapter that changes nothing yet.

        Args:
            adapter_name: Its name.
            config: Of the adapter.
            key: The layer's name in the model.
        """
        self.scaling[adapter_name] = self.initial_scaling[adapter_name] = 1.0
        if config.dora_rank:
            weight = self.get_base_layer().weight
            self.sparse_dora[adapter_name] = MaskedDora(weight, config.dora_rank, transposed=self.is_conv1d)
        if config.is_saved:  # the file brings the positions
            count = _count(config, key, self.shape[0] * self.shape[1])
            self.put_in(adapter_name, torch.zeros(count, dtype=masks.dtype_of(self.shape)))
            self.unchecked[adapter_name] = True
        elif config.mask in masks.GRADIENT_KINDS:
            self.put_in(adapter_name, torch.zeros(0, dtype=masks.dtype_of(self.shape)))
        else:
            self.put_in(adapter_name, self._chosen(config, key))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _chosen(self, config: ShiraTunerConfig, key: str) -> Tensor:
        weight = self.get_base_layer().weight
        seed = config.seed if config.mask == "rand" else 0
        return masks.choose(
            config.mask, weight, config.density, part=config.part, offset=config.offset, seed=seed, name=key
        )

    def put_in(self, adapter_name: str, positions: Tensor) -> None:
        """Give an adapter its positions, and values of zero; a DoRA stays."""
        device = self.get_base_layer().weight.device
        self.sparse_positions[adapter_name] = positions.to(device)
        self.sparse_fingerprint[adapter_name] = torch.zeros(3, dtype=torch.int64, device=device)
        if adapter_name in self.sparse_dora:
            return
        if adapter_name not in self.sparse_values:
            self.sparse_values[adapter_name] = nn.Parameter(torch.zeros(0, device=device))
        values = self.sparse_values[adapter_name]
        # the parameter itself stays: an optimiser may hold it already
        values.data, values.grad = values.data.new_zeros(len(positions)), None

    def receive(self, adapter_name: str, state: Mapping[str, Tensor], prefix: str) -> None:
        """Make ready for an adapter of a state dict, of whatever size, to be looked at when it is first used.

        Raises:
            AdapterError: If the state dict has its positions, but not what gives as many values, or a DoRA of another
                rank or of another layer.
        """
        positions, there = state[f"{prefix}sparse_positions.{adapter_name}"], self.sparse_positions[adapter_name]
        self.check_fits(adapter_name, state, prefix)
        if adapter_name in self.merged_adapters:
            self.unmerge()
        if len(positions) != len(there):
            self.put_in(adapter_name, torch.zeros_like(positions))
        if f"{prefix}sparse_fingerprint.{adapter_name}" not in state:
            self.sparse_fingerprint[adapter_name].zero_()  # of another file
        self.unchecked[adapter_name] = True

    def check_fits(self, adapter_name: str, state: Mapping[str, Tensor], prefix: str) -> None:
        """Look at what a state dict has for an adapter of this layer, before anything of it is taken over.

        Args:
            adapter_name: Which adapter.
            state: Of any layers.
            prefix: What the layer's names in it begin with.

        Raises:
            AdapterError: As :meth:`receive`.
        """
        places, layer = f"sparse_positions.{adapter_name}", prefix[:-1]
        if prefix + places not in state:
            return
        count, is_dora = state[prefix + places].numel(), adapter_name in self.sparse_dora
        wanted: dict[str, tuple[int, ...]] = {f"sparse_values.{adapter_name}": (count,)}
        if is_dora:
            parts = self.sparse_dora[adapter_name].named_parameters()
            wanted = {f"sparse_dora.{adapter_name}.{part}": tuple(p.shape) for part, p in parts}
        if missing := sorted(key for key in wanted if prefix + key not in state):
            raise AdapterError(
                f"adapter {adapter_name!r} is {'a DoRA' if is_dora else 'no DoRA'}: the file has positions for "
                f"{layer}, but no {missing[0]}; load it under a new name, or save it again"
            )
        wanted[places] = (count,)
        found = {key: tuple(state[prefix + key].shape) for key in wanted}
        here, there = (shapes.get(f"sparse_dora.{adapter_name}.A", ()) for shapes in (wanted, found))
        if here[:1] != there[:1]:
            raise AdapterError(
                f"adapter {adapter_name!r} is a DoRA of rank {here[0]} in {layer}, the file's is of rank {there[0]}; "
                "load it under a new name, or delete the adapter that is there first"
            )
        for key, shape in found.items():
            if shape != wanted[key]:
                raise AdapterError(
                    f"adapter {adapter_name!r} doesn't fit: {key} of {layer} is {shape} in the file, expected "
                    f"{wanted[key]}; copy it again, or load the base model that it was trained on"
                )

    def fingerprint(self, adapter_name: str) -> Fingerprint:
        """Of the base weight at an adapter's positions."""
        with self._unmerged():
            return fingerprint_of(gathered(self.get_base_layer().weight, self.sparse_positions[adapter_name]))

    def mark(self, adapter_name: str) -> None:
        """Note what base an adapter is of, for its file."""
        # in place: a state dict may be under way
        self.sparse_fingerprint[adapter_name].copy_(torch.tensor(self.fingerprint(adapter_name)))

    # --- the update ---------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer on the changed weight."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [name for name in self.active_adapters if name in self.sparse_positions]
        if self.disable_adapters or self.merged or not names:
            output: Tensor = self.base_layer(x, *args, **kwargs)
            return output
        self._check(names)
        positions, values = self._together(names)
        base = self.get_base_layer()
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        result: Tensor = sparse_linear(x, values, base.weight, base.bias, positions, self.is_conv1d)
        return result

    def _check(self, names: list[str]) -> None:
        for name in names:
            if not len(self.sparse_positions[name]) and self.training:
                raise AdapterBankError(
                    f"adapter {name!r} has no positions yet: its mask is chosen by the task's gradient; call "
                    "adapterbank.shira.calibrate(model, batches) before training"
                )
            self.check_loaded(name)

    def check_loaded(self, adapter_name: str) -> None:
        """Look at what a file brought, once: its positions and values, and the base model that it was made for.

        Raises:
            AdapterError: If no file came, positions don't ascend within the weight, values aren't finite, or the base
                is another model's.
        """
        if adapter_name not in self.unchecked:
            return
        positions, total = self.sparse_positions[adapter_name], self.shape[0] * self.shape[1]
        if len(positions) > 1 and not positions.any():
            raise AdapterError(
                f"adapter {adapter_name!r} has the config of a saved one, whose file wasn't loaded; use "
                "PeftModel.from_pretrained, or a new ShiraTunerConfig for a new adapter"
            )
        inside = not len(positions) or (int(positions[0]) >= 0 and int(positions[-1]) < total)
        if not inside or not bool((positions[1:] > positions[:-1]).all()):
            raise AdapterError(
                f"adapter {adapter_name!r} is damaged: its positions don't ascend within {total} weights; copy it again"
            )
        if not bool(self.values(adapter_name).isfinite().all()):
            raise AdapterError(
                f"adapter {adapter_name!r} is damaged: its values hold nan or inf; take an earlier checkpoint"
            )
        expected = read_fingerprint(self.sparse_fingerprint[adapter_name])
        if expected is not None and not check_fingerprint(expected, self.fingerprint(adapter_name)):
            raise AdapterError(
                f"adapter {adapter_name!r} was made for a base model with other weights; load the one it was trained on"
            )
        del self.unchecked[adapter_name]

    def _together(self, names: list[str]) -> tuple[Tensor, Tensor]:
        """Positions and values of the active adapters' sum."""
        positions = [self.sparse_positions[name] for name in names]
        values = [self._values(name) for name in names]
        if len(names) == 1:
            return positions[0], values[0]
        union, place = torch.unique(torch.cat(positions), return_inverse=True)
        every = torch.cat(values)
        return union, every.new_zeros(len(union)).index_add(0, place, every)

    def _values(self, name: str) -> Tensor:
        values: Tensor
        if name in self.sparse_dora:
            values = self.sparse_dora[name](self.get_base_layer().weight, self.sparse_positions[name])
        else:
            values = self.sparse_values[name]
        return values if self.scaling[name] == 1 else self.scaling[name] * values

    def values(self, adapter_name: str) -> Float[Tensor, " nnz"]:
        """What an adapter adds to the base weight at its positions, its strength included."""
        with self._unmerged():
            return self._values(adapter_name)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The dense update in the base weight's own orientation."""
        values = self.values(adapter)
        found = values.new_zeros(self.shape[0] * self.shape[1])
        return found.index_put((self.sparse_positions[adapter].long(),), values).view(self.shape)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Never: its rank is as high as the layer allows; see ``SparseDelta.to_lora``."""
        return False

    # --- merging ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the values into the base weight, for good or until :meth:`unmerge`, which brings back every bit.

        Args:
            safe_merge: Look at the new values first.
            adapter_names: By default all active ones.

        Raises:
            ValueError: If a merged weight is not finite, with ``safe_merge``.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.sparse_positions]
        for name in names:
            self.check_loaded(name)
        added = {name: self.values(name) for name in names}  # all of them before the first write
        for name in names:
            weight, positions = self.get_base_layer().weight.data, self.sparse_positions[name]
            saved = gathered(weight, positions)
            new = changed(saved, added[name])
            if safe_merge and not new.isfinite().all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            put_(weight, positions, new)
            self.merged_adapters.append(name)
            self._overwritten[name] = saved

    @torch.no_grad()
    def unmerge(self) -> None:
        """Write back what was overwritten, last first."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            put_(self.get_base_layer().weight.data, self.sparse_positions[name], self._overwritten.pop(name))

    @contextmanager
    def _unmerged(self) -> Iterator[None]:
        """The base model's weight for a while, whatever is merged."""
        weight = self.get_base_layer().weight.data
        merged = [(self.sparse_positions[name], self._overwritten[name]) for name in self.merged_adapters]
        now = [gathered(weight, positions) for positions, _ in merged]
        try:
            for positions, saved in reversed(merged):
                put_(weight, positions, saved)
            yield
        finally:
            for (positions, _), values in zip(merged, now, strict=True):
                put_(weight, positions, values)


class Linear(nn.Module, SparseLayer):
    """``torch.nn.Linear`` and transformers' ``Conv1D`` with a sparse update."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: ShiraTunerConfig, key: str) -> None:
        """Wrap ``base_layer`` and add the first adapter."""
        super().__init__()
        SparseLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, key)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """See :meth:`SparseLayer.forward`."""
        return SparseLayer.forward(self, x, *args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in list(self.sparse_positions.keys()):
            if f"{prefix}sparse_positions.{name}" in state_dict:
                self.receive(name, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __repr__(self) -> str:
        return "sparse_shira." + super().__repr__()


def _count(config: ShiraTunerConfig, key: str, most: int) -> int:
    count = (config.counts or {}).get(key)
    if type(count) is not int or not 0 <= count <= most:
        raise AdapterError(
            f"the adapter's config says {str(count)[:40]} values of {key}, which has {most}; copy adapter_config.json "
            "again, or load the base model that it was trained on"
        )
    return count
