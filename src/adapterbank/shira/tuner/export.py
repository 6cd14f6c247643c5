"""A live sparse adapter as data."""

from typing import Any

from peft import get_peft_model_state_dict

from adapterbank.errors import AdapterError
from adapterbank.shira.delta import SparseDelta
from adapterbank.shira.files import load
from adapterbank.shira.tuner.model import layers_of


def read_model(model: Any, adapter_name: str, name: str) -> SparseDelta:
    """See :meth:`SparseDelta.from_peft`."""
    if not layers_of(model, adapter_name):
        raise AdapterError(f"the model has no sparse adapter {adapter_name!r}")
    config = model.peft_config[adapter_name]
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    return load(state, name=name, config=config.to_dict())
