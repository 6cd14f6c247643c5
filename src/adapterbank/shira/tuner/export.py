"""A live sparse adapter as data."""

from typing import Any

from peft import get_peft_model_state_dict

from adapterbank.errors import AdapterError
from adapterbank.shira.delta import SparseDelta
from adapterbank.shira.files import load
from adapterbank.shira.tuner.config import PREFIX
from adapterbank.shira.tuner.model import layers_of


def read_model(model: Any, adapter_name: str, name: str) -> SparseDelta:
    """See :meth:`SparseDelta.from_peft`; the values are those in use: a DoRA's, at the strength that was set."""
    layers = layers_of(model, adapter_name)
    if not layers:
        raise AdapterError(f"the model has no sparse adapter {adapter_name!r}")
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    found = {}
    for layer, module in layers.items():
        found[f"{layer}.sparse_positions"] = module.sparse_positions[adapter_name]
        found[f"{layer}.sparse_values"] = module.values(adapter_name).detach()
        found[f"{layer}.sparse_fingerprint"] = module.sparse_fingerprint[adapter_name]
    mine = tuple(f"{layer}.{PREFIX}" for layer in layers)
    head = {key: tensor for key, tensor in state.items() if not key.removeprefix("base_model.model.").startswith(mine)}
    return load(head | found, name=name, config=model.peft_config[adapter_name].to_dict())
