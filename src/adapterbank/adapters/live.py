"""Adapters in and out of live PEFT models: the one file here that imports PEFT, and only when it is called."""

import warnings
from collections.abc import Mapping
from enum import Enum
from typing import Any

from torch import Tensor, nn

from adapterbank.adapters.adapter import LoraAdapter
from adapterbank.adapters.names import base_model_id, match_modules
from adapterbank.adapters.peft_config import written_config
from adapterbank.adapters.peft_keys import PREFIX, WRAPPED
from adapterbank.errors import AdapterError, UnknownNameError


def read_model(model: Any, adapter_name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and a copy of the tensors of one adapter of a live model, as ``save_pretrained`` would write them.

    Embeddings that were resized but are not in ``modules_to_save`` are left out: PEFT decides about those by asking
    the hub for the base model's config.

    Raises:
        UnknownNameError: If the model has no such adapter.
    """
    _peft()
    from peft import get_peft_model_state_dict

    adapters = getattr(model, "peft_config", {})
    if adapter_name not in adapters:
        raise UnknownNameError(f"the model has no adapter {adapter_name!r}; it has {', '.join(adapters) or 'none'}")
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    # second, because collecting AdaLoRA's tensors also takes the adapter's name out of its rank_pattern
    config = {field: _plain(value) for field, value in adapters[adapter_name].to_dict().items()}
    return config, {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def write_model(adapter: LoraAdapter, model: Any, adapter_name: str | None) -> Any:
    """Add ``adapter`` to a live model and activate it; arguments and errors as in :meth:`LoraAdapter.to_peft`."""
    _peft()
    from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    where = f"adapter {adapter.name!r}"
    # torch forbids dots in the keys of a ModuleDict
    adapter_name = adapter.name.replace(".", "_") if adapter_name is None else adapter_name
    if adapter_name in getattr(model, "peft_config", {}):
        raise AdapterError(f"{where}: the model has an adapter {adapter_name!r} already; pass another adapter_name=")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    targets = _targets(adapter, base, where)
    _compare_base(adapter, base, where)
    # read everything before the model is touched, so that a broken adapter leaves it as it was
    values: dict[str, Tensor] = {}
    for module, target in targets.items():
        factors = adapter.factors(module)
        values[f"{PREFIX}{target}.lora_A.weight"] = factors.A
        values[f"{PREFIX}{target}.lora_B.weight"] = factors.B
    for name, target in _extra_targets(adapter, base, where).items():
        values[PREFIX + target] = adapter.extra(name)

    config = _live_config(adapter, targets)
    try:
        if isinstance(model, PeftModel):
            model.add_adapter(adapter_name, config)
        else:
            model = get_peft_model(model, config, adapter_name=adapter_name)
    except ValueError as error:
        raise AdapterError(f"{where}: PEFT can't add it to this model: {error}") from error
    # PEFT insists on a value for every head that the task type brings along, also where the adapter has none
    defaults = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    set_peft_model_state_dict(model, defaults | values, adapter_name=adapter_name)
    model.set_adapter(adapter_name, inference_mode=True)
    # as from_pretrained does: the new layers' dropout would be on otherwise
    return model.eval()


def _live_config(adapter: LoraAdapter, targets: Mapping[str, str]) -> Any:
    """A ``LoraConfig`` for exactly these modules under their live names."""
    from peft import LoraConfig

    shapes = {targets[module]: shape for module, shape in adapter.modules.items()}
    scales = {targets[module]: scale for module, scale in adapter.scales.items()}
    # no id of the base: PEFT takes the model's own, and would warn about another one
    config = written_config(adapter.config, None, shapes, scales)
    config |= {"target_modules": sorted(shapes), "exclude_modules": None}
    config |= {"layers_to_transform": None, "layers_pattern": None}
    del config["peft_type"]
    return LoraConfig(**config)


def _peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise AdapterError("live models need PEFT: pip install 'adapterbank[peft]'") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    return sorted(value) if isinstance(value, (set, frozenset)) else value


def _layers(base: nn.Module) -> dict[str, nn.Module]:
    """The model's own layers that have a weight, by the names they have without any adapter."""
    layers: dict[str, nn.Module] = {}
    for name, module in base.named_modules():
        parts = name.split(".")
        if "modules_to_save" in parts or any(part.startswith("lora_") for part in parts):
            continue
        # a layer that PEFT wrapped is one level below its own name
        wrapped = hasattr(module, "base_layer") or hasattr(module, "original_module")
        if not wrapped and getattr(module, "weight", None) is not None:
            layers[".".join(part for part in parts if part not in WRAPPED)] = module
    return layers


def _targets(adapter: LoraAdapter, base: nn.Module, where: str) -> dict[str, str]:
    """The live module for each module of the adapter, all of them and of the right sizes."""
    layers = _layers(base)
    targets = match_modules(adapter.modules, layers)
    for module, shape in adapter.modules.items():
        if module not in targets:
            raise AdapterError(
                f"{where}, {module}: the model ({type(base).__name__}) has no such module; "
                f"is it the base of this adapter ({adapter.base})?"
            )
        found = layer_sizes(layers[targets[module]])
        if found is not None and found != (shape.d_in, shape.d_out):
            raise AdapterError(
                f"{where}, {module}: the model's layer maps {found[0]} to {found[1]} features, the adapter "
                f"{shape.d_in} to {shape.d_out}; load the base of this adapter ({adapter.base})"
            )
    if len(set(targets.values())) < len(targets):
        raise AdapterError(
            f"{where}: several of its modules fit the same module of the model; pass its full base model"
        )
    if renamed := [(module, target) for module, target in targets.items() if module != target]:
        warnings.warn(f"{where}: {renamed[0][0]} goes to the model's {renamed[0][1]}, and so on", stacklevel=4)
    return targets


def layer_sizes(layer: Any) -> tuple[int, int] | None:
    """``(d_in, d_out)`` of a linear layer, also of a quantised one; none of other modules."""
    if hasattr(layer, "in_features"):
        return int(layer.in_features), int(layer.out_features)
    if hasattr(layer, "nf"):  # transformers' Conv1D
        return int(layer.weight.shape[0]), int(layer.nf)
    return None


def _extra_targets(adapter: LoraAdapter, base: nn.Module, where: str) -> Mapping[str, str]:
    """The live name for each extra that has a place in the model: those without one are named in a warning."""
    owners = {name: _owner(name) for name in adapter.extra_names}
    targets = match_modules(owners.values(), _layers(base))
    if lost := [name for name, owner in owners.items() if owner not in targets]:
        warnings.warn(
            f"{where}: the model ({type(base).__name__}) has no place for {', '.join(lost[:3])}; left out", stacklevel=4
        )
    return {name: targets[owner] + name.removeprefix(owner) for name, owner in owners.items() if owner in targets}


def _owner(name: str) -> str:
    """The layer that a tensor belongs to: ``a.b`` for ``a.b.weight``, ``a.b.base_layer.bias``, ``a.b.lora_B.bias``."""
    parts = name.split(".")[:-1]
    while parts and (parts[-1] in WRAPPED or parts[-1] == "lora_B"):
        parts.pop()
    return ".".join(parts)


def _compare_base(adapter: LoraAdapter, base: Any, where: str) -> None:
    found = base_model_id(getattr(base, "name_or_path", None))
    if found and adapter.base and found != adapter.base:
        # names and shapes fit, and one model goes by many ids
        warnings.warn(f"{where} was trained on {adapter.base}, this model is {found}", stacklevel=4)
