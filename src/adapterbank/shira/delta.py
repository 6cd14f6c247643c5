"""A SHiRA adapter as data: for each changed parameter some positions and what is added there."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from adapterbank.adapters import LoraAdapter
from adapterbank.adapters.names import check_name, match_modules
from adapterbank.errors import AdapterError
from adapterbank.shira.fingerprint import Fingerprint, check_fingerprint, fingerprint_of
from adapterbank.shira.masks import dtype_of

Shape = tuple[int, int]
Model = nn.Module | Mapping[str, Tensor]
"""Whatever holds the weights: a model, or its parameters by name."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types that can be changed in place."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SparseUpdate:
    """What is added to one parameter: ``W.view(-1)[positions] += alpha * values``.

    Raises:
        AdapterError: If positions don't ascend within the shape, or a value isn't finite.
    """

    positions: Int[Tensor, " nnz"]
    """Flat, in row-major order, ascending: int32 where that reaches, else int64."""
    values: Float[Tensor, " nnz"]
    shape: Shape
    """Of the parameter as the model has it: ``(d_out, d_in)`` of a Linear, the reverse of GPT-2's Conv1D."""
    fingerprint: Fingerprint | None = None
    """Of the base model's values at the positions, see :func:`fingerprint_of`; none where no base was at hand."""

    def __post_init__(self) -> None:
        total, positions = self.shape[0] * self.shape[1], self.positions
        if len(positions) and (int(positions[0]) < 0 or int(positions[-1]) >= total):
            raise AdapterError(f"positions reach from {positions[0]} to {positions[-1]}, {self.shape} has {total}")
        if not bool((positions.diff() > 0).all()):
            raise AdapterError("positions must ascend without repetition; sort them with their values")
        if not bool(self.values.isfinite().all()):
            raise AdapterError("values hold nan or inf; take an earlier checkpoint")

    @classmethod
    def of(cls, positions: Tensor, values: Tensor, shape: Shape) -> "SparseUpdate":
        """Of positions in any order and integer type, ``(nnz,)``.

        Raises:
            AdapterError: If there aren't as many values, they repeat or lie outside, or a value isn't finite.
        """
        if positions.shape != values.shape or positions.ndim != 1:
            raise AdapterError(
                f"positions are {positions.dtype} {tuple(positions.shape)}, values {values.dtype} "
                f"{tuple(values.shape)}; there must be as many"
            )
        if positions.dtype not in (torch.int32, torch.int64) or values.dtype not in FLOATS:
            raise AdapterError(
                f"positions are {positions.dtype}, values {values.dtype}; give int32 or int64, and floats of 16 bits "
                "or more"
            )
        order = positions.long().argsort()
        checked = cls(positions=positions[order].long().cpu(), values=values[order].detach().cpu(), shape=shape)
        return replace(checked, positions=checked.positions.to(dtype_of(shape)))

    @property
    def density(self) -> float:
        """Share of the parameter that is changed."""
        return len(self.positions) / (self.shape[0] * self.shape[1])

    def dense(self) -> Float[Tensor, "rows columns"]:
        """The update as a matrix."""
        found = torch.zeros(self.shape[0] * self.shape[1], dtype=self.values.dtype)
        found[self.positions.long()] = self.values
        return found.view(self.shape)


@dataclass(frozen=True, kw_only=True, eq=False)
class SparseDelta:
    """One adapter: updates of some parameters, and a task head where it has one.

    Made by :meth:`from_tensors`, :meth:`load` (``shira/files.py``), or by conversion (``shira/convert.py``).
    """

    name: str
    updates: Mapping[str, SparseUpdate]
    """By the parameter's name in the base model, sorted, e.g. ``model.layers.0.self_attn.q_proj.weight``."""
    base: str | None = None
    """Id of the base model."""
    mask: str | None = None
    """How the positions were chosen: one of ``masks.KINDS``, or somebody else's word for it."""
    seed: int | None = None
    """Of a random mask."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors of modules that were trained whole, by name."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """What a PEFT config says beside all this, e.g. ``task_type``."""

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, tuple[Tensor, Tensor]],
        shapes: Mapping[str, Shape],
        *,
        name: str = "adapter",
        weights: Mapping[str, Tensor] | None = None,
        fingerprints: Mapping[str, Fingerprint] | None = None,
        **fields: Any,
    ) -> "SparseDelta":
        """Build a delta from positions and values in any order.

        Args:
            tensors: ``(flat positions, values)`` by parameter name.
            shapes: Shape of each of these parameters.
            name: Of the adapter.
            weights: The base model's parameters: their values at the positions become the fingerprint.
            fingerprints: In the place of ``weights``, where they're known: by parameter name.
            fields: ``base``, ``mask``, ``seed``, ``extras`` and ``config``.

        Raises:
            AdapterError: If a shape or a weight is missing or another one, positions repeat or lie outside, or values
                aren't finite.
        """
        updates = {}
        for parameter in sorted(tensors):
            if parameter not in shapes:
                raise AdapterError(f"adapter {name!r}: the shape of {parameter} is missing")
            shape = (int(shapes[parameter][0]), int(shapes[parameter][1]))
            if weights is not None and (parameter not in weights or tuple(weights[parameter].shape) != shape):
                raise AdapterError(f"adapter {name!r}: weights has no {parameter} of {shape}; give those of its base")
            try:
                update = SparseUpdate.of(*tensors[parameter], shape)
            except AdapterError as error:
                raise AdapterError(f"adapter {name!r}, {parameter}: {error}") from error
            if weights is not None:
                update = replace(update, fingerprint=fingerprint_of(gathered(weights[parameter], update.positions)))
            elif fingerprints is not None:
                update = replace(update, fingerprint=fingerprints.get(parameter))
            updates[parameter] = update
        return cls(name=check_name(name), updates=updates, **fields)

    @classmethod
    def from_peft(cls, model: nn.Module, adapter_name: str = "default", *, name: str | None = None) -> "SparseDelta":
        """Take a sparse adapter out of a live PEFT model: a copy of its values as they are now, and of its head.

        Args:
            model: A ``PeftModel``.
            adapter_name: Which of its adapters.
            name: Of the result; by default ``adapter_name``.

        Raises:
            AdapterError: If the model has no such sparse adapter.
        """
        from adapterbank.shira.tuner.export import read_model

        return read_model(model, adapter_name, name or adapter_name)

    @classmethod
    def from_dense(
        cls, updates: Mapping[str, Tensor], density: float, **fields: Any
    ) -> "tuple[SparseDelta, dict[str, float]]":
        """The largest entries of dense updates, and the energy they hold; see ``shira/convert.py``."""
        from adapterbank.shira.convert import from_dense

        return from_dense(updates, density, **fields)

    @classmethod
    def from_lora(cls, adapter: LoraAdapter, density: float) -> "tuple[SparseDelta, dict[str, float]]":
        """The largest entries of a LoRA's update, and the energy they hold; see ``shira/convert.py``."""
        from adapterbank.shira.convert import from_lora

        return from_lora(adapter, density)

    def to_lora(self, r: int, *, fan_in_fan_out: bool | None = None) -> tuple[LoraAdapter, dict[str, float]]:
        """The nearest LoRA of a rank, and its errors; see ``shira/convert.py``."""
        from adapterbank.shira.convert import to_lora

        return to_lora(self, r, fan_in_fan_out=fan_in_fan_out)

    @property
    def nnz(self) -> int:
        """Changed values of all parameters."""
        return sum(len(update.positions) for update in self.updates.values())

    @property
    def density(self) -> float:
        """Changed values over all values of the parameters that are changed at all."""
        total = sum(update.shape[0] * update.shape[1] for update in self.updates.values())
        return self.nnz / total if total else 0.0

    # --- on disk ----------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Tensor], **options: Any) -> "SparseDelta":
        """Open a sparse adapter: ours, or PEFT's SHiRA or Super-Tuning; see :func:`adapterbank.shira.files.load`."""
        from adapterbank.shira.files import load

        return load(source, **options)

    def save(self, directory: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write a directory that PEFT's layout has; see :func:`adapterbank.shira.files.save`."""
        from adapterbank.shira.files import save

        save(self, directory, dtype=dtype)

    # --- in place ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def apply_(self, model: Model, *, alpha: float = 1.0, heads: bool = True, check: bool = True) -> dict[str, Tensor]:
        """Add the update to a model's weights in place, and put in its task head where it has one.

        Args:
            model: The base model; its names may have other leading parts than the adapter's.
            alpha: Strength; 0 leaves the weights as they are.
            heads: Off: weights only.
            check: Compare the fingerprint of the base where the adapter has one.

        Returns:
            What was overwritten, for :meth:`restore_`. It, and nothing else, brings the base back bit for bit.

        Raises:
            AdapterError: If a parameter is missing, of another shape, no plain dense tensor, or another base model's.
                Then no weight has changed.
        """
        weights, places = self.weights_in(model), self.heads_in(model) if heads else {}
        saved = {name: gathered(weights[name], update.positions) for name, update in self.updates.items()}
        if check:
            self.check_base(saved)
        saved |= {name: place.detach().clone() for name, place in places.items()}
        for name, update in self.updates.items():
            put_(weights[name], update.positions, changed(saved[name], update.values, alpha))
        for name, place in places.items():
            place.detach().copy_(self.extras[name])
        return saved

    @torch.no_grad()
    def restore_(self, model: Model, saved: Mapping[str, Tensor]) -> None:
        """Write back what :meth:`apply_` returned."""
        weights = self.weights_in(model)
        for name, update in self.updates.items():
            put_(weights[name], update.positions, saved[name])
        places = self.heads_in(model) if saved.keys() >= self.extras.keys() else {}
        for name, place in places.items():
            place.detach().copy_(saved[name])

    def weights_in(self, model: Model) -> dict[str, Tensor]:
        """The model's tensor for each parameter of the delta.

        Raises:
            AdapterError: If one is missing, has another shape, is another parameter too, fits several of the adapter's,
                or can't be changed in place.
        """
        where, present = f"adapter {self.name!r}", tensors_of(model)
        owners, found = dict[int, list[str]](), dict[str, Tensor]()
        for name, tensor in present.items():
            owners.setdefault(tensor.data_ptr(), []).append(name)
        places = match_modules(self.updates, present)
        for name, update in self.updates.items():
            if name not in places:
                raise AdapterError(f"{where}: the model has no {name}; is it the base of this adapter?")
            weight = present[places[name]]
            if tuple(weight.shape) != update.shape:
                raise AdapterError(
                    f"{where}: {name} is {update.shape}, the model's {places[name]} {tuple(weight.shape)}; load the "
                    "base of this adapter"
                )
            if weight.dtype not in FLOATS or not weight.is_contiguous() or weight.is_meta:
                raise AdapterError(
                    f"{where}: {places[name]} is no dense floating-point tensor of its own ({weight.dtype}, "
                    f"{'meta' if weight.is_meta else 'strides ' + str(weight.stride())}); load the base unquantised"
                )
            if len(tied := owners[weight.data_ptr()]) > 1:
                raise AdapterError(f"{where}: {' and '.join(tied)} are one tensor of the model: both would change")
            found[name] = weight
        if len({id(weight) for weight in found.values()}) < len(found):
            raise AdapterError(
                f"{where}: several of its parameters fit one of the model's; give the whole model, not a part of it"
            )
        return found

    def heads_in(self, model: Model) -> dict[str, Tensor]:
        """The model's tensor for each of the ``extras``.

        Raises:
            AdapterError: If one is missing or has another shape.
        """
        where, present = f"adapter {self.name!r}", tensors_of(model)
        places = match_modules(self.extras, present)
        for name, head in self.extras.items():
            there = tuple(present[places[name]].shape) if name in places else None
            if there != tuple(head.shape):
                raise AdapterError(
                    f"{where} brings its own {name}, {tuple(head.shape)}; the model's is "
                    f"{there or 'missing'}: load the base with such a head, or pass heads=False for the weights alone"
                )
        return {name: present[places[name]] for name in self.extras}

    def check_base(self, values: Mapping[str, Tensor]) -> None:
        """Compare base values at the positions with the fingerprints, where both are at hand.

        Raises:
            AdapterError: If they are another model's.
        """
        for name, update in self.updates.items():
            if update.fingerprint is None or name not in values:
                continue
            if not check_fingerprint(update.fingerprint, fingerprint_of(values[name])):
                raise AdapterError(
                    f"adapter {self.name!r}: {name} has other values than the base model it was made for"
                    + (f", {self.base}" if self.base else "")
                    + "; is another adapter applied or merged? load the base, or pass check=False"
                )

    def __repr__(self) -> str:
        return (
            f"SparseDelta({self.name!r}, base={self.base!r}, nnz={self.nnz:,}, density={self.density:.2%}, "
            f"parameters={len(self.updates)})"
        )


def tensors_of(model: Model) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones under each of theirs."""
    if isinstance(model, nn.Module):
        return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return dict(model)


def gathered(weight: Tensor, positions: Int[Tensor, " nnz"]) -> Float[Tensor, " nnz"]:
    """A weight's values at flat positions."""
    return weight.detach().view(-1).index_select(0, positions.to(weight.device))


def changed(base: Float[Tensor, " nnz"], values: Float[Tensor, " nnz"], alpha: float = 1.0) -> Float[Tensor, " nnz"]:
    """``base + alpha * values`` in the base's type, on its device."""
    # at least in float32: a product in bfloat16 would round twice, and float32 would cut float64
    wide = torch.promote_types(base.dtype, torch.float32)
    return (base.to(wide) + alpha * values.to(base.device, wide)).to(base.dtype)


def put_(weight: Tensor, positions: Int[Tensor, " nnz"], values: Float[Tensor, " nnz"]) -> None:
    """Overwrite a weight's values at flat positions."""
    # scatter_ takes no int32, and is the fastest that overwrites
    index = positions.to(weight.device, torch.int64)
    weight.detach().view(-1).scatter_(0, index, values.to(weight.device, weight.dtype))
