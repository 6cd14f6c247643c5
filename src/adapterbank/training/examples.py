"""Examples of a task from a file, one JSON object a line, and as a model takes them."""

import json
import random
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers.image_utils import load_image
from transformers.utils import is_vision_available

from adapterbank.errors import AdapterBankError, MissingFileError

Example = dict[str, Any]
"""One line of the data: ``text``, ``prompt`` and ``completion``, or ``image``; ``label`` where the task has one."""

TASKS = {"seq-cls": "SEQ_CLS", "causal-lm": "CAUSAL_LM", "image-cls": None}
"""PEFT's name of each task; it has none for images."""
FIELDS = {
    "seq-cls": '{"text": ..., "label": ...}',
    "causal-lm": '{"text": ...} or {"prompt": ..., "completion": ...}',
    "image-cls": '{"image": "relative/path.png", "label": ...}',
}
IGNORED = -100  # the label that transformers' losses leave out


def read_examples(path: Path, task: str, labels: list[str] | None = None) -> list[Example]:
    """Examples of a ``.jsonl`` file; labels as text, images as paths.

    Args:
        path: The file.
        task: One of ``TASKS``.
        labels: Those that are known, if others are an error.

    Raises:
        MissingFileError: If the file or an image isn't there.
        AdapterBankError: If a line isn't an example of the task, or there are none.
    """
    if task == "image-cls" and not is_vision_available():
        raise AdapterBankError("image-cls reads images with pillow, which isn't installed: pip install pillow")
    if not path.is_file():
        raise MissingFileError(f"{path} isn't a file; give one with one JSON object a line: {FIELDS[task]}")
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise AdapterBankError(f"{path}, line {number}: no JSON ({error}); expected {FIELDS[task]}") from None
            found.append(_example(row, task, path, number, labels))
    if not found:
        raise AdapterBankError(f"{path} is empty; expected one JSON object a line: {FIELDS[task]}")
    return found


def _example(row: Any, task: str, path: Path, number: int, labels: list[str] | None) -> Example:
    where = f"{path}, line {number}"
    if task == "causal-lm":
        names = ["text"] if isinstance(row, dict) and "text" in row else ["prompt", "completion"]
    else:
        names = [{"seq-cls": "text", "image-cls": "image"}[task], "label"]
    if not isinstance(row, dict):
        raise AdapterBankError(f"{where}: a {type(row).__name__}, expected {FIELDS[task]}")
    for name in names:
        if name not in row:
            raise AdapterBankError(f"{where}: no {name!r}; expected {FIELDS[task]}")
        kinds = (str, int) if name == "label" else (str,)
        if not isinstance(row[name], kinds) or isinstance(row[name], bool):
            kind = "text or a whole number" if name == "label" else "text"
            raise AdapterBankError(f"{where}: {name!r} is {json.dumps(row[name])[:40]}, expected {kind}")
        if name in ("text", "completion") and not row[name].strip():
            raise AdapterBankError(f"{where}: {name!r} is empty; leave the line out")
    example = {name: row[name] for name in names}
    if "label" in example:
        example["label"] = str(example["label"])
        if labels and example["label"] not in labels:
            known = ", ".join(labels)
            raise AdapterBankError(
                f"{where}: label {example['label']!r} is none of those in the training data: {known}"
            )
    if "image" in example:
        example["image"] = path.absolute().parent / example["image"]
        if not example["image"].is_file():
            raise MissingFileError(f"{where}: there is no image {example['image']}; paths are relative to the data")
    return example


def labels_of(examples: list[Example], path: Path) -> list[str]:
    """Labels of the examples, in order.

    Raises:
        AdapterBankError: If there is one only.
    """
    names = {example["label"] for example in examples}
    if len(names) < 2:
        raise AdapterBankError(f"{path}: all {len(examples)} examples have the label {names.pop()!r}; give two labels")
    # 10 after 9, and numbers before words
    return sorted(names, key=lambda name: (0, int(name), "") if name.isdecimal() else (1, 0, name))


def split(examples: list[Example], share: float, seed: int, path: Path) -> tuple[list[Example], list[Example]]:
    """Training and evaluation part; evenly spaced in the order of labels, so that none comes short.

    Raises:
        AdapterBankError: If there is one example only.
    """
    if len(examples) < 2:
        raise AdapterBankError(f"{path}: one example can't be split; give more, or a file to evaluate on")
    order = random.Random(seed).sample(examples, len(examples))
    order.sort(key=lambda example: example.get("label", ""))
    count = min(max(1, round(len(order) * share)), len(order) - 1)
    chosen = {int((i + 0.5) * len(order) / count) for i in range(count)}
    parts: tuple[list[Example], list[Example]] = ([], [])
    for position, example in enumerate(order):
        parts[position in chosen].append(example)
    return parts


class _Images(Dataset[dict[str, Any]]):
    """Images, read when they are asked for: all of them at once may not fit into memory."""

    def __init__(self, examples: list[Example], processor: Any, labels: list[str]) -> None:
        self.examples, self.processor, self.labels = examples, processor, labels

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.examples[index]
        try:
            image = load_image(str(example["image"]))
        except (OSError, ValueError) as error:
            raise AdapterBankError(f"{example['image']} can't be read as an image: {error}") from error
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": self.labels.index(example["label"])}


def encoded(examples: list[Example], processor: Any, task: str, labels: list[str], most: int) -> Any:
    """A data set of what the model takes: tokens, at most ``most`` of them, or pixels, and labels."""
    if task == "image-cls":
        return _Images(examples, processor, labels)
    if task == "causal-lm":
        return [_tokens(example, processor, most) for example in examples]
    found = processor([example["text"] for example in examples], truncation=True, max_length=most)
    return [
        {name: values[i] for name, values in found.items()} | {"labels": labels.index(example["label"])}
        for i, example in enumerate(examples)
    ]


def _tokens(example: Example, tokenizer: Any, most: int) -> dict[str, list[int]]:
    """Tokens and labels; of a prompt no loss is taken, and where room is short it loses its beginning."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    asked: list[int] = tokenizer(example.get("prompt", ""))["input_ids"]  # with the token that begins a text
    if end and asked[-1:] == end:
        asked = asked[:-1]
    told = tokenizer(example.get("completion", example.get("text")), add_special_tokens=False)["input_ids"]
    told = (told + end)[:most]
    asked = asked[max(0, len(asked) + len(told) - most) :]
    return {
        "input_ids": asked + told,
        "attention_mask": [1] * len(asked + told),
        "labels": [IGNORED] * len(asked) + told,
    }
