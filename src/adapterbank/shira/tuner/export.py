"""A live sparse adapter as data."""

from typing import Any

from peft import get_peft_model_state_dict

from adapterbank.errors import AdapterError
from adapterbank.shira.delta import SparseDelta
from adapterbank.shira.files import load
from adapterbank.shira.tuner.model import layers_of


def read_model(model: Any, adapter_name: str, name: str) -> SparseDelta:
    """See :meth:`SparseDelta.from_peft`; the values are those in use, with the strength that ``set_scale`` gave."""
    layers = layers_of(model, adapter_name)
    if not layers:
        raise AdapterError(f"the model has no sparse adapter {adapter_name!r}")
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    for key in state:
        layer, _, last = key.removeprefix("base_model.model.").rpartition(".")
        if last == "sparse_values":
            state[key] = layers[layer].values(adapter_name).detach()
    return load(state, name=name, config=model.peft_config[adapter_name].to_dict())
