"""SmolLM2 with really trained members: a mixed batch against its rows alone, and against PEFT on exported adapters."""

import copy
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapterbank.adapters import LoraAdapter
from adapterbank.bank import Bank
from adapterbank.runtime import AdapterEngine
from adapterbank.shira import SparseDelta
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
    adapters = [_trained(task, language.source_steps) for task in fields["tasks"]]
    bank = Bank.fit(adapters)
    deltas = {f"sparse-{task}": _sparse(bank, task, fields["density"]) for task in fields["sparse"]}
    rows = [
        Row(member=member, prompt=f"{question} ->")
        for task in fields["tasks"]
        for question, _ in language.split(task, train=0, seed=0).test[: fields["prompts"]]
        for member in (task, *(name for name in deltas if name == f"sparse-{task}"), None)
    ]
    random.Random(seed).shuffle(rows)
    text = _Text(weights(), fields["new_tokens"], rows)
    expected = text.expected(bank, deltas)
    found = [text.served(bank, deltas, expected, bits) for bits in (16, 32)]
    base = text.alone(text.model, dict.fromkeys(rows))
    return {
        "title": case.title,
        **{name: fields[name] for name in ("prompts", "new_tokens", "density")},
        "members": len(adapters),
        "sparse": len(deltas),
        "rows": len(rows),
        "bank_error": max(bank.errors().values()),
        "ways": found,
        "base_logits_from_unpadded": float(
            (text.logits(text.model) - base.logits)[[row.member is None for row in rows]].abs().max()
        ),
        "largest_logit": float(base.logits.abs().max()),
        "changed": sum(a != b for a, b in zip(expected.alone.tokens, base.tokens, strict=True)),
        "adapted": sum(row.member is not None for row in rows),
        "targets": _targets({way["bits"]: way for way in found}),
    }


def _targets(found: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Logits where nothing is rounded, tokens at the default width."""
    return [
        _target("difference of logits from PEFT's, at 32 bits", found[32]["logits_from_peft"], LOGITS),
        _target("difference of logits from those of one member for all rows", found[16]["logits_from_one"], LOGITS),
        _target("rows with other tokens than PEFT's", found[16]["tokens_from_peft"], 0),
        _target("rows with other tokens than alone", found[16]["tokens_from_alone"], 0),
    ]


def _target(name: str, reached: float, most: float) -> dict[str, Any]:
    return {"name": name, "at_most": most, "reached": reached, "met": reached <= most}


def _trained(task: str, steps: int) -> LoraAdapter:
    """A source adapter of the study, under the names that its layers have in the plain model."""
    loaded = LoraAdapter.load(Source(subject="language", task=task, family="private", steps=steps).train())
    factors = {module.removeprefix("lm."): loaded.factors(module) for module in loaded.modules}
    return LoraAdapter.from_factors(task, factors, base=loaded.base)


def _sparse(bank: Bank, task: str, density: float) -> SparseDelta:
    """A member's largest values: how good it is doesn't matter here, but that it is another one."""
    delta, _ = SparseDelta.from_lora(bank.reconstruct(task), density)
    return replace(delta, name=f"sparse-{task}")


@dataclass(frozen=True, kw_only=True)
class _Alone:
    """What each row gives by itself, without padding."""

    logits: Tensor
    """Of the prompt's last token, ``(rows, words)``."""
    tokens: list[list[int]]


@dataclass(frozen=True, kw_only=True)
class _Expected:
    """What PEFT gives; for sparse adapters a model whose weights they changed."""

    logits: Tensor
    """Of the padded batch, each row by its own adapter."""
    alone: _Alone


class _Text:
    """SmolLM2 in float32, and the rows that it is asked."""

    def __init__(self, folder: Path, new_tokens: int, rows: Sequence[Row]) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.new_tokens, self.rows = new_tokens, rows

    def logits(self, model: Any, rows: Sequence[Row] | None = None) -> Tensor:
        """Of each prompt's last token; shorter prompts are padded on the left."""
        batch = self._batch(self.rows if rows is None else rows)
        places = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
        with torch.no_grad():
            found: Tensor = model(**batch, position_ids=places, logits_to_keep=1).logits[:, -1]
        return found

    def tokens(self, model: Any, rows: Sequence[Row]) -> list[list[int]]:
        """Greedily, up to the end that the model set: what follows in a batch is padding."""
        batch = self._batch(rows)
        with torch.no_grad():
            found = model.generate(**batch, max_new_tokens=self.new_tokens, do_sample=False)
        end, lines = self.model.generation_config.eos_token_id, found[:, batch["input_ids"].shape[1] :].tolist()
        return [line[: line.index(end) + 1] if end in line else line for line in lines]

    def _batch(self, rows: Sequence[Row]) -> Any:
        return self.tokenizer([row.prompt for row in rows], return_tensors="pt", padding=True)

    def alone(self, model: Any, contexts: Mapping[Row, Callable[[], AbstractContextManager[Any]] | None]) -> _Alone:
        """Row by row, each inside its context."""
        logits, tokens = [], []
        for row in self.rows:
            with (contexts[row] or nullcontext)():
                logits.append(self.logits(model, [row]))
                tokens += self.tokens(model, [row])
        return _Alone(logits=torch.cat(logits), tokens=tokens)

    def expected(self, bank: Bank, deltas: Mapping[str, SparseDelta]) -> _Expected:
        """Member by member."""
        whole, logits, tokens = dict[int, Tensor](), dict[int, Tensor](), dict[int, list[int]]()
        with tempfile.TemporaryDirectory(prefix="adapterbank-bench-") as scratch:
            for member in dict.fromkeys(row.member for row in self.rows):
                model = copy.deepcopy(self.model)
                if member in deltas:
                    deltas[member].apply_(model)
                elif member is not None:
                    bank.export(member, Path(scratch) / member)
                    model = PeftModel.from_pretrained(model, Path(scratch) / member).eval()
                padded = self.logits(model)
                for i, row in enumerate(self.rows):
                    if row.member == member:
                        whole[i], logits[i] = padded[i], self.logits(model, [row])[0]
                        (tokens[i],) = self.tokens(model, [row])
        order = range(len(self.rows))
        return _Expected(
            logits=torch.stack([whole[i] for i in order]),
            alone=_Alone(logits=torch.stack([logits[i] for i in order]), tokens=[tokens[i] for i in order]),
        )

    def served(self, bank: Bank, deltas: Mapping[str, SparseDelta], expected: _Expected, bits: int) -> dict[str, Any]:
        """The mixed batch against one member for all rows, each row alone in the engine, and PEFT."""
        engine = AdapterEngine(self.model, bank, bits=bits)
        for delta in deltas.values():
            engine.add(delta)
        with engine.adapters([row.member for row in self.rows]):
            mixed, tokens = self.logits(self.model), self.tokens(self.model, self.rows)
        one = mixed.clone()
        for member in dict.fromkeys(row.member for row in self.rows):
            own = [row.member == member for row in self.rows]
            with engine.adapters([member] * len(self.rows)):
                one[own] = self.logits(self.model)[own]
        alone = self.alone(self.model, {row: partial(engine.adapters, [row.member]) for row in self.rows})
        report = engine.report()
        engine.close()
        return {
            "bits": bits,
            "private_work": report.private_work,
            "bytes": report.basis_bytes + report.shared_bytes + report.private_bytes + report.sparse_bytes,
            "logits_from_one": float((mixed - one).abs().max()),
            "logits_from_peft": float((mixed - expected.logits).abs().max()),
            "logits_from_unpadded": float((mixed - expected.alone.logits).abs().max()),
            "tokens_from_alone": sum(a != b for a, b in zip(tokens, alone.tokens, strict=True)),
            "tokens_from_peft": sum(a != b for a, b in zip(tokens, expected.alone.tokens, strict=True)),
        }
