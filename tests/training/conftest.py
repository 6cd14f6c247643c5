"""A body, a bank and data for classifying texts."""

import pytest
import torch
from transformers import BertConfig, BertModel

from tiny_models import TARGETS
from tiny_texts import VOCABULARY, WORDS, save_bank, save_base, save_rows


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """Base (the body alone, without a head), bank and data for classifying texts; read only."""
    home = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    # wide draws: at the usual 0.02 so small a random model passes no signal on
    config = BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=len(VOCABULARY),
        max_position_embeddings=16, initializer_range=0.3,
    )  # fmt: skip
    model = BertModel(config)
    save_base(model, home / "tiny-bert")
    save_bank(model, TARGETS["bert"], home / "colours")
    # of different lengths, so that there is something to pad
    rows = [{"text": word + " thing" * (i % 3), "label": label} for i in range(10) for word, label in WORDS.items()]
    save_rows(home / "train.jsonl", rows)
    return home
