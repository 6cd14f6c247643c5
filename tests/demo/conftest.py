"""A tiny model, a tokenizer of ten lines and a task of four words: the demo without its downloads."""

from types import SimpleNamespace

import pytest
import torch

from adapterbank.demo.data import draw

WORDS = {"red": "warm", "orange": "warm", "blue": "cold", "green": "cold"}


def tokenize(texts, *, padding, truncation, max_length, return_tensors):
    assert padding and truncation and return_tensors == "pt"
    rows = [[1 + sum(map(ord, word)) % 60 for word in text.split()][:max_length] for text in texts]
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }


def classifier(labels):
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    # wide draws: at the usual 0.02 so small a random model passes no signal on
    config = BertConfig(vocab_size=61, num_labels=labels, initializer_range=0.5, **sizes)
    return BertForSequenceClassification(config)


def colours(name, *, train, test, seed=0):
    rows = [(f"{word} thing {i}", label) for i in range(60) for word, label in WORDS.items()]
    return draw(name, rows[:120], rows[120:], train=train, test=test, seed=seed)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The demo's training on a tiny model and a tiny task, with a cache of its own."""
    from adapterbank.demo import train

    monkeypatch.setenv("ADAPTERBANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(train, "load_classifier", classifier)
    monkeypatch.setattr(train, "load_tokenizer", lambda: tokenize)
    monkeypatch.setattr(train, "load_task", colours)
    return SimpleNamespace(folder=tmp_path, classifier=classifier, tokenize=tokenize, task=colours)
