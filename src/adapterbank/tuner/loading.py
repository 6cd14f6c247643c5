"""Loading a task that was trained in a bank, with errors where PEFT would only warn or fail without a word."""

from os import PathLike
from typing import Any

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.utils import load_peft_weights

from adapterbank.bank import Bank
from adapterbank.errors import AdapterError
from adapterbank.tuner.config import EigenLoraConfig


def load(
    model: Any,
    path: str | PathLike[str],
    *,
    bank: Bank | str | PathLike[str] | None = None,
    adapter_name: str = "default",
    is_trainable: bool = False,
    **download: Any,
) -> PeftModel:
    """Load a trained task into a model.

    Args:
        model: The base model, or a ``PeftModel``, which gets one more adapter and keeps its active one.
        path: Directory or hub id of the task.
        bank: Its bank, where it can't be found by itself; see ``EigenLoraConfig.bank``.
        adapter_name: Name of the adapter in the model.
        is_trainable: Whether training goes on.
        download: ``subfolder``, ``revision``, ``token`` and the like, as for ``PeftModel.from_pretrained``.

    Returns:
        The ``PeftModel``.

    Raises:
        MissingFileError: If the bank is not found.
        BankError: If it is another bank, or not as it was.
        AdapterError: If the file lacks weights, or has others than the config says. The model is then as it was.
    """
    config = EigenLoraConfig.from_pretrained(str(path), bank=bank, **download)
    if not isinstance(config, EigenLoraConfig):
        raise AdapterError(f"{path} is of a {type(config).__name__}, expected a task that was trained in a bank")
    config.inference_mode = not is_trainable
    weights = load_peft_weights(str(path), device="cpu", **download)
    fresh = not isinstance(model, PeftModel)
    if fresh:
        kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
        model = kind(model, config, adapter_name)
    else:
        model.add_adapter(adapter_name, config)
    try:
        _compare(model, adapter_name, weights, str(path))
    except AdapterError:
        model.unload() if fresh else model.delete_adapter(adapter_name)
        raise
    set_peft_model_state_dict(model, weights, adapter_name=adapter_name)
    if is_trainable:
        model.set_requires_grad(adapter_name)
    return model if is_trainable else model.eval()


def _compare(model: PeftModel, adapter_name: str, weights: dict[str, Any], path: str) -> None:
    expected = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    for key, value in expected.items():
        if key not in weights:
            raise AdapterError(f"{path} lacks {key}; was it saved from another model or by another version?")
        if weights[key].shape != value.shape:
            raise AdapterError(
                f"{path}: {key} is {tuple(weights[key].shape)}, model and config expect {tuple(value.shape)}; load the "
                "base that it was trained on, with as many labels"
            )
    strangers = sorted(key for key in weights.keys() - expected.keys() if ".eig_" in key)
    if strangers:
        raise AdapterError(
            f"{path} holds {strangers[0]}, for which the model has no place; is it the right base model?"
        )
