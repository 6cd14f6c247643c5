"""SmolLM2 with really trained members: a mixed batch against its rows alone, and against PEFT on exported adapters."""

import copy
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapterbank.adapters import LoraAdapter
from adapterbank.bank import Bank
from adapterbank.runtime import AdapterEngine
from adapterbank.shira import SparseDelta, from_lora
from benchmarks.adaptation.language import Language, weights
from benchmarks.adaptation.sources import Source
from benchmarks.cases import Case

LOGITS = 1e-4
"""Most that logits may differ by, in float32."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the batch."""

    member: str | None
    prompt: str


def run(case: Case, seed: int) -> dict[str, Any]:
    """The batch at every width of tables, with what was aimed at."""
    torch.set_num_threads(1)
    fields, language = case.fields, Language()
    adapters = [
        LoraAdapter.load(
            Source(subject="language", task=task, family="private", steps=language.source_steps).train(), name=task
        )
        for task in fields["tasks"]
    ]
    bank = Bank.fit(adapters)
    deltas = [_sparse(bank, task, fields["density"]) for task in fields["sparse"]]
    rows = [
        Row(member=member, prompt=f"{question} ->")
        for task in fields["tasks"]
        for question, _ in language.split(task, train=0, seed=0).test[: fields["prompts"]]
        for member in (task, *(delta.name for delta in deltas if delta.name == f"sparse-{task}"), None)
    ]
    random.Random(seed).shuffle(rows)
    text = _Text(weights(), fields["new_tokens"])
    alone = text.alone(rows, bank, deltas)
    found = [text.served(rows, bank, deltas, alone, bits) for bits in (16, 32)]
    return {
        "title": case.title,
        **{name: fields[name] for name in ("prompts", "new_tokens", "density")},
        "members": len(adapters),
        "sparse": len(deltas),
        "rows": len(rows),
        "bank_error": max(bank.errors().values()),
        "ways": found,
        "changed": sum(
            a.tokens != b.tokens for a, b in zip(alone, text.base(rows), strict=True) if a.row.member is not None
        ),
        "adapted": sum(row.member is not None for row in rows),
        "targets": [
            _target("difference of logits from PEFT's", found[0]["logits_from_peft"], LOGITS),
            _target("difference of logits from those of rows alone", found[0]["logits_from_alone"], LOGITS),
            _target("rows with other tokens than PEFT's", found[0]["tokens_from_peft"], 0),
            _target("rows with other tokens than alone", found[0]["tokens_from_alone"], 0),
        ],
    }


def _target(name: str, reached: float, most: float) -> dict[str, Any]:
    return {"name": name, "at_most": most, "reached": reached, "met": reached <= most}


def _sparse(bank: Bank, task: str, density: float) -> SparseDelta:
    """A member's largest values: how good it is doesn't matter here, but that it is another one."""
    delta, _ = from_lora(bank.reconstruct(task), density)
    return SparseDelta.from_tensors(
        {name: (update.positions, update.values) for name, update in delta.updates.items()},
        {name: update.shape for name, update in delta.updates.items()},
        name=f"sparse-{task}",
    )


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """What a row gave."""

    row: Row
    logits: Tensor
    """Of the prompt's last token."""
    tokens: list[int]


class _Text:
    """SmolLM2 in float32."""

    def __init__(self, folder: Path, new_tokens: int) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.new_tokens = new_tokens

    def answers(self, model: Any, rows: Sequence[Row]) -> list[_Answer]:
        """All rows as one batch, shorter ones padded on the left."""
        batch = self.tokenizer([row.prompt for row in rows], return_tensors="pt", padding=True)
        places = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
        with torch.no_grad():
            logits = model(**batch, position_ids=places, logits_to_keep=1).logits[:, -1]
            tokens = model.generate(**batch, max_new_tokens=self.new_tokens, do_sample=False)
        new = tokens[:, batch["input_ids"].shape[1] :].tolist()
        return [
            _Answer(row=row, logits=own, tokens=self._whole(line))
            for row, own, line in zip(rows, logits, new, strict=True)
        ]

    def _whole(self, line: list[int]) -> list[int]:
        """Up to the end that the model set: what follows in a batch is padding."""
        end = self.model.generation_config.eos_token_id
        return line[: line.index(end) + 1] if end in line else line

    def base(self, rows: Sequence[Row]) -> list[_Answer]:
        """Without adapters, row by row."""
        return [self.answers(self.model, [row])[0] for row in rows]

    def alone(self, rows: Sequence[Row], bank: Bank, deltas: Sequence[SparseDelta]) -> list[_Answer]:
        """Each row by itself, by PEFT on the exported adapter; sparse ones in the weights."""
        found: dict[Row, _Answer] = {}
        with tempfile.TemporaryDirectory(prefix="adapterbank-bench-") as scratch:
            for member in dict.fromkeys(row.member for row in rows):
                model, own = copy.deepcopy(self.model), [row for row in rows if row.member == member]
                if sparse := next((delta for delta in deltas if delta.name == member), None):
                    sparse.apply_(model)
                elif member is not None:
                    bank.export(member, Path(scratch) / member)
                    model = PeftModel.from_pretrained(model, Path(scratch) / member).eval()
                found |= {row: self.answers(model, [row])[0] for row in own}
        return [found[row] for row in rows]

    def served(
        self, rows: Sequence[Row], bank: Bank, deltas: Sequence[SparseDelta], expected: Sequence[_Answer], bits: int
    ) -> dict[str, Any]:
        """The mixed batch against each row alone in the engine, and against what is expected."""
        engine = AdapterEngine(self.model, bank, bits=bits)
        for delta in deltas:
            engine.add(delta)
        with engine.adapters([row.member for row in rows]):
            mixed = self.answers(self.model, rows)
        alone = []
        for row in rows:
            with engine.adapters([row.member]):
                alone += self.answers(self.model, [row])
        report = engine.report()
        engine.close()
        return {
            "bits": bits,
            "private_work": report.private_work,
            "bytes": report.basis_bytes + report.shared_bytes + report.private_bytes + report.sparse_bytes,
            "logits_from_alone": _apart(mixed, alone),
            "logits_from_peft": _apart(mixed, expected),
            "tokens_from_alone": sum(a.tokens != b.tokens for a, b in zip(mixed, alone, strict=True)),
            "tokens_from_peft": sum(a.tokens != b.tokens for a, b in zip(mixed, expected, strict=True)),
        }


def _apart(one: Sequence[_Answer], other: Sequence[_Answer]) -> float:
    return max(float((a.logits - b.logits).abs().max()) for a, b in zip(one, other, strict=True))
