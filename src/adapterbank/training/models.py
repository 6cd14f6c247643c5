"""Base models for a task: their head, their tokenizer or image processor, and what is trained beside an adapter."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from adapterbank.errors import AdapterBankError

_MODELS = {
    "seq-cls": AutoModelForSequenceClassification,
    "causal-lm": AutoModelForCausalLM,
    "image-cls": AutoModelForImageClassification,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class BaseModel:
    """A base model with a fresh head, ready for an adapter."""

    model: Any
    processor: Any
    """Its tokenizer or image processor."""
    heads: list[str]
    """Modules that are trained whole; none of a language model."""

    def most_tokens(self, wanted: int) -> int:
        """``wanted``, or as many tokens as the model takes."""
        limits = (
            getattr(self.processor, "model_max_length", None),
            getattr(self.model.config, "max_position_embeddings", None),
        )
        return min([wanted, *(int(limit) for limit in limits if limit)])


def load_base(model: str, task: str, labels: list[str], seed: int) -> BaseModel:
    """Load a base model for a task.

    Args:
        model: Directory or hub id.
        task: One of ``examples.TASKS``.
        labels: Names of the classes, in the order of the outputs; none for ``causal-lm``.
        seed: Of the head's start.

    Raises:
        AdapterBankError: If it can't be loaded as a model for the task.
    """
    torch.manual_seed(seed)
    names: dict[str, Any] = {}
    if labels:
        names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
        # of another task's head with as many outputs nothing but the size would be right
        names |= {"num_labels": len(labels), "ignore_mismatched_sizes": True}
    images = task == "image-cls"
    try:
        processor: Any = (AutoImageProcessor if images else AutoTokenizer).from_pretrained(model)
        base, info = _MODELS[task].from_pretrained(model, output_loading_info=True, **names)
    except (OSError, ValueError, ImportError) as error:  # ImportError: a tokenizer that needs another package
        reason = str(error).strip().split("\n")[0]
        raise AdapterBankError(f"{model} can't be loaded as a model for {task}: {reason}") from error
    missing = sorted(info["missing_keys"])
    if not labels and missing:
        raise AdapterBankError(f"{model} is no language model: it has no {missing[0]}; train seq-cls with it instead")
    if not images:
        _pad(base, processor, model)
    return BaseModel(model=base, processor=processor, heads=_heads(base, missing) if labels else [])


def _pad(base: Any, tokenizer: Any, model: str) -> None:
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise AdapterBankError(f"{model}: its tokenizer has no token to pad with, and none that ends a text")
        tokenizer.pad_token = tokenizer.eos_token
    # models that read the last token find it by this
    base.config.pad_token_id = tokenizer.pad_token_id


def _heads(base: Any, missing: list[str]) -> list[str]:
    """What stands beside the model's body or wasn't in its file: of heads, PEFT knows two names only."""
    beside = {name for name, child in base.named_children() if any(True for _ in child.parameters())}
    beside.discard(base.base_model_prefix)
    return sorted(beside | {name.rpartition(".")[0] for name in missing if name.split(".")[0] not in beside})
