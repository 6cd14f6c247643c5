"""MiniLM on labelled texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel
from transformers.modeling_outputs import SequenceClassifierOutput

from adapterbank.demo.models import MINILM_ID, load_tokenizer, minilm
from benchmarks.adaptation.subject import Batch, Sample, Split, in_bfloat16
from benchmarks.adaptation.texts import load_split

MAX_TOKENS = 48


class MeanPooled(nn.Module):
    """A BERT with a linear head on the mean of its tokens, which is how MiniLM was trained to be read."""

    def __init__(self, bert: Any, labels: int) -> None:
        super().__init__()
        self.bert = bert
        self.config = bert.config
        self.classifier = nn.Linear(bert.config.hidden_size, labels)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Logits ``(b, labels)``, and the loss where labels are given."""
        # bfloat16 products take half of the time; head and loss stay in float32
        with torch.autocast(input_ids.device.type, torch.bfloat16):
            hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.float()
        mask = attention_mask.unsqueeze(-1).to(hidden)
        logits = self.classifier((hidden * mask).sum(1) / mask.sum(1))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


@dataclass(frozen=True)
class Encoder:
    """MiniLM-L6 (22.7M parameters, 6 layers, 384 wide) on labelled texts."""

    base_id: str = MINILM_ID
    targets: tuple[str, ...] = ("query", "value")
    head: tuple[str, ...] = ("classifier",)
    source_steps: int = 120

    def split(self, task: str, *, train: int, seed: int) -> Split:
        """See ``Subject``."""
        return load_split(task, train=train, seed=seed)

    def base(self, split: Split) -> nn.Module:
        """See ``Subject``."""
        torch.manual_seed(0)
        # eager: torch's fused attention is slower on a CPU at these lengths
        bert = AutoModel.from_pretrained(minilm(), local_files_only=True, attn_implementation="eager")
        return MeanPooled(in_bfloat16(bert), len(split.labels))

    def batch(self, examples: Sequence[Sample]) -> Batch:
        """See ``Subject``."""
        ids = [_tokens(text) for text, _ in examples]
        longest = max(map(len, ids))
        padded = torch.zeros(len(ids), longest, dtype=torch.long)
        mask = torch.zeros_like(padded)
        for i, row in enumerate(ids):
            padded[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        return {"input_ids": padded, "attention_mask": mask, "labels": torch.tensor([label for _, label in examples])}

    def right(self, logits: Tensor, batch: Batch) -> Tensor:
        """See ``Subject``."""
        return logits.argmax(-1) == batch["labels"]


@cache
def _tokens(text: str) -> tuple[int, ...]:
    return tuple(_tokenizer()(text, truncation=True, max_length=MAX_TOKENS)["input_ids"])


@cache
def _tokenizer() -> Any:
    return load_tokenizer()
