"""One LoRA adapter, whatever it was stored as: module shapes and scales at once, tensors one module at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapterbank.adapters.factors import LoraFactors, ModuleShape
from adapterbank.adapters.names import base_model_id, check_name
from adapterbank.adapters.official import OFFICIAL_TYPE, official_factors
from adapterbank.adapters.peft_config import Scaling, clean_config, peft_type, refuse_variants, written_config
from adapterbank.adapters.peft_files import open_source, write_directory
from adapterbank.adapters.peft_keys import PREFIX, ModuleKeys, sort_keys
from adapterbank.adapters.tensors import TensorDict, TensorSource
from adapterbank.errors import AdapterError, UnknownNameError


@dataclass(frozen=True, kw_only=True, eq=False)
class LoraAdapter:
    """A trained LoRA adapter. Made by :meth:`load`, :meth:`from_factors` or :meth:`from_peft`.

    Holds an index, not the weights: a thousand of these are cheap, and they can be pickled to worker processes.
    """

    name: str
    base: str | None
    """Id of the base model; never a local path."""
    rank: int
    """The config's ``r``; single modules may differ, see ``modules``."""
    alpha: float
    """The config's ``lora_alpha``; what counts is ``scales``."""
    task_type: str | None
    modules: Mapping[str, ModuleShape]
    """Shapes by module name, e.g. ``bert.encoder.layer.0.attention.self.query``, sorted."""
    scales: Mapping[str, float]
    """Scale of each module's update: alpha / r with rsLoRA, patterns and AdaLoRA accounted for."""
    extra_names: tuple[str, ...]
    """Everything else that is stored: task heads, trained biases."""
    config: Mapping[str, Any]
    """The fields of ``adapter_config.json`` that outlive training, without any local path."""
    source_bytes: int
    """Bytes of the weights as they were stored."""
    _source: TensorSource
    _keys: Mapping[str, ModuleKeys]
    _extra_keys: Mapping[str, str]

    @classmethod
    def load(
        cls,
        source: str | Path | Mapping[str, Tensor],
        *,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        allow_pickle: bool = False,
    ) -> "LoraAdapter":
        """Open an adapter; of a safetensors file only the header is read.

        Args:
            source: A PEFT directory, a ``.safetensors`` file with its config beside it, a hub id ``org/name`` or
                ``org/name@revision``, or a state dict as from ``peft.get_peft_model_state_dict``.
            name: Name of the adapter; by default the directory's own.
            config: Fields of ``adapter_config.json`` to use instead of the file; needed for a state dict.
            allow_pickle: Also read ``adapter_model.bin``, through ``torch.load(weights_only=True)``.

        Raises:
            MissingFileError: If there is nothing at ``source``.
            AdapterError: If it is no plain LoRA; the message names it, the module at fault and the way out.
        """
        name, config, tensors = open_source(source, name=name, config=config, allow_pickle=allow_pickle)
        return cls.from_tensors(name, config, tensors)

    @classmethod
    def from_factors(
        cls,
        name: str,
        factors: Mapping[str, LoraFactors],
        *,
        base: str | None = None,
        config: Mapping[str, Any] | None = None,
        extras: Mapping[str, Tensor] | None = None,
        origin: TensorSource | None = None,
    ) -> "LoraAdapter":
        """Make an adapter in memory.

        Args:
            name: Name of the adapter.
            factors: Factors by module name. PEFT multiplies an extra ``<module>.lora_B.bias`` by the scale too, so
                with such extras the scales must be those of the adapter they come from.
            base: Id of the base model; by default the one in ``config``.
            config: Fields to write back, as in another adapter's ``config``; ranks and scales are the factors' own.
            extras: Task heads and biases by name, as in ``extra_names``.
            origin: The file that all this was computed from, whose size and hash count as the adapter's.

        Raises:
            AdapterError: If there is no module, or a name is unusable.
        """
        where = f"adapter {check_name(name)!r}"
        if not factors:
            raise AdapterError(f"{where} would have no module; give at least one")
        extras = extras or {}
        tensors: dict[str, Tensor] = {}
        keys: dict[str, ModuleKeys] = {}
        for module, parts in sorted(factors.items()):
            keys[module] = ModuleKeys(A=f"{module}.lora_A.weight", B=f"{module}.lora_B.weight")
            tensors |= {keys[module].A: parts.A, keys[module].B: parts.B}
        if clash := tensors.keys() & extras.keys():
            raise AdapterError(f"{where}: {min(clash)} is given as an extra and as a factor")
        shapes = {module: ModuleShape(rank=factors[module].rank, d_in=factors[module].d_in, d_out=factors[module].d_out)
                  for module in keys}  # fmt: skip
        scales = {module: float(factors[module].scale) for module in keys}
        # any rank and alpha do: the factors' own replace them
        given = {**(config or {}), "peft_type": "LORA", "r": 1, "lora_alpha": 1}
        given = clean_config({**given, "rank_pattern": None, "alpha_pattern": None}, where)
        base = base_model_id(base) or given.get("base_model_name_or_path")
        kept = clean_config(written_config(given, base, shapes, scales), where)
        size, sha256 = (None, None) if origin is None else (origin.size, origin.digest())
        source = TensorDict({**tensors, **extras}, size=size, sha256=sha256)
        return cls(
            name=name,
            base=base,
            rank=kept["r"],
            alpha=float(kept["lora_alpha"]),
            task_type=kept.get("task_type"),
            modules=shapes,
            scales=scales,
            extra_names=tuple(sorted(extras)),
            config=kept,
            source_bytes=source.size,
            _source=source,
            _keys=keys,
            _extra_keys={extra: extra for extra in extras},
        )

    @classmethod
    def from_peft(cls, model: Any, adapter_name: str = "default", name: str | None = None) -> "LoraAdapter":
        """Take an adapter out of a live PEFT model: a copy of its weights as they are now.

        Args:
            model: A ``PeftModel``.
            adapter_name: Which of its adapters.
            name: Name of the result; by default ``adapter_name``.

        Raises:
            UnknownNameError: If the model has no such adapter.
            AdapterError: If it is no plain LoRA.
        """
        from adapterbank.adapters.live import read_model

        config, tensors = read_model(model, adapter_name)
        return cls.from_tensors(check_name(name or adapter_name), config, TensorDict(tensors))

    @classmethod
    def from_tensors(cls, name: str, config: Mapping[str, Any], source: TensorSource) -> "LoraAdapter":
        """Make an adapter of an opened file; errors as in :meth:`load`."""
        where = f"adapter {name!r}"
        if peft_type(config) == OFFICIAL_TYPE:
            factors, extras = official_factors(source, where)
            return cls.from_factors(name, factors, config=config, extras=extras, origin=source)
        refuse_variants(config, where)
        kept = clean_config(config, where)
        scaling = Scaling(kept, where)
        keys, extra_keys = sort_keys(source.entries, where, adalora=scaling.is_adalora)
        modules = {module: parts.shape(source.entries, scaling.rank(module), f"{where}, {module}")
                   for module, parts in sorted(keys.items())}  # fmt: skip
        return cls(
            name=name,
            base=kept.get("base_model_name_or_path"),
            rank=scaling.default_rank,
            alpha=scaling.default_alpha,
            task_type=kept.get("task_type"),
            modules=modules,
            scales={module: scaling.scale(module) for module in modules},
            extra_names=tuple(sorted(extra_keys)),
            config=kept,
            source_bytes=source.size,
            _source=source,
            _keys=keys,
            _extra_keys=extra_keys,
        )

    def factors(self, module: str) -> LoraFactors:
        """Read the factors of one module, in float32 on the CPU.

        Raises:
            UnknownNameError: If the adapter has no such module.
            AdapterError: If a value is not finite.
        """
        if module not in self.modules:
            raise UnknownNameError(f"adapter {self.name!r} has no module {module!r}; it has {len(self.modules)} others")
        keys, shape = self._keys[module], self.modules[module]
        A = self._source.read(keys.A).to(torch.float32)
        B = self._source.read(keys.B).to(torch.float32)
        if keys.E is not None:
            A = A * self._source.read(keys.E).to(torch.float32)
            if A.shape[0] == 0:  # AdaLoRA cut the module to nothing; a LoRA has at least rank 1
                A, B = torch.zeros(1, shape.d_in), torch.zeros(shape.d_out, 1)
        for letter, factor in (("A", A), ("B", B)):
            # a sum that is finite has no other terms, and takes a tenth of the time
            if not factor.sum().isfinite() and not factor.isfinite().all():
                bad = int((~factor.isfinite()).sum())
                raise AdapterError(
                    f"adapter {self.name!r}, {module}: {letter} has {bad} values of {factor.numel()} that are not "
                    "finite; its training diverged, take an earlier checkpoint"
                )
        return LoraFactors(A=A, B=B, scale=self.scales[module])

    def extra(self, name: str) -> Tensor:
        """Read a task head's or bias's tensor, in its stored dtype.

        Raises:
            UnknownNameError: If the adapter has no such tensor.
            AdapterError: If a value is not finite.
        """
        if name not in self._extra_keys:
            raise UnknownNameError(
                f"adapter {self.name!r} has no tensor {name!r}; it has {', '.join(self.extra_names)}"
            )
        tensor = self._source.read(self._extra_keys[name])
        # float8 has no isfinite
        values = tensor.to(torch.float32) if tensor.element_size() == 1 else tensor
        if not values.isfinite().all():
            raise AdapterError(
                f"adapter {self.name!r}: {name} has values that are not finite; take an earlier checkpoint"
            )
        return tensor

    def source_hash(self) -> str:
        """sha256 of the weights file; of the tensors where the adapter was made in memory."""
        return self._source.digest()

    def save(self, directory: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Write an ordinary PEFT directory, all or nothing.

        Args:
            directory: A new or empty directory, or one that holds nothing but an adapter, which is replaced.
            dtype: Of A and B; task heads keep their own.

        Raises:
            AdapterError: If ``directory`` holds anything else, or a value does not fit ``dtype``.
        """
        where = f"adapter {self.name!r}"
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise AdapterError(f"{where}: PEFT stores float32, float16 or bfloat16, not {dtype}")
        tensors: dict[str, Tensor] = {}
        for module in self.modules:
            factors = self.factors(module)
            for letter, factor in (("A", factors.A), ("B", factors.B)):
                stored = factor.to(dtype).contiguous()
                if not stored.isfinite().all():
                    raise AdapterError(
                        f"{where}, {module}: {letter} reaches {factor.abs().max():.3g}, too large for {dtype}; "
                        "write float32 or bfloat16"
                    )
                tensors[f"{PREFIX}{module}.lora_{letter}.weight"] = stored
        for name in self.extra_names:
            tensors[PREFIX + name] = self.extra(name)
        write_directory(
            Path(directory), written_config(self.config, self.base, self.modules, self.scales), tensors, where
        )

    def to_peft(self, model: Any, adapter_name: str | None = None) -> Any:
        """Put the adapter into a live model and make it the active one; no file is written.

        Args:
            model: The base model, which PEFT changes in place, or a ``PeftModel``, which gets one more adapter.
            adapter_name: Its name there; by default this adapter's, with ``_`` for dots, which PEFT can't have.

        Returns:
            The ``PeftModel``, in evaluation mode as after ``PeftModel.from_pretrained``.

        Raises:
            AdapterError: If the model has no place for a module, or an adapter of that name already.
        """
        from adapterbank.adapters.live import write_model

        return write_model(self, model, adapter_name)

    def __repr__(self) -> str:
        return f"LoraAdapter({self.name!r}, base={self.base!r}, r={self.rank}, modules={len(self.modules)})"
