"""Labelled texts, split once into training, validation and test; the test part never meets a choice."""

import json
import random
import tarfile
from functools import cache

from adapterbank.demo.assets import fetch
from adapterbank.demo.data import PAIRS, Row, source_rows, unique
from benchmarks.adaptation.assets import SPAM, bigbench
from benchmarks.adaptation.subject import Split

HELD_OUT = ("reuters-r8", "tweets", "rotten-tomatoes", "spam", "intent", "fever")
"""Tasks of another kind than the sources'."""
DOMAINS = ("hotels", "medicine", "products", "reviews")
SOURCES = (*PAIRS, *(f"multiemo-{domain}" for domain in DOMAINS))
RELATED = ("baseball-hockey", "electronics-crypt", "multiemo-hotels")
"""Sources that are left out in turn: tasks of the others' kind."""
VALIDATION, TEST = 160, 400


def load_split(name: str, *, train: int, seed: int) -> Split:
    """Draw a task's three parts, disjoint; the same ones for the same arguments.

    Args:
        name: One of ``HELD_OUT`` and ``SOURCES``.
        train: Most examples to train on.
        seed: Of the draw.
    """
    pools = _pools(name)
    labels = tuple(sorted({label for _, label in pools[0]}))
    index = {label: i for i, label in enumerate(labels)}
    shuffled = []
    for pool in pools:
        rows = [(text, index[label]) for text, label in pool if label in index]
        random.Random(f"{name} {seed}").shuffle(rows)
        shuffled.append(rows)
    first, second = shuffled if len(shuffled) == 2 else (shuffled[0], [])
    validation, rest = first[:VALIDATION], first[VALIDATION:]
    if not second:  # no split of its own: what isn't needed for training is for testing
        cut = max(len(rest) - TEST, min(train, 2 * len(rest) // 3))
        rest, second = rest[:cut], rest[cut:]
    kept = rest[:train]
    seen = {text for text, _ in (*kept, *validation)}
    test = [row for row in second if row[0] not in seen][:TEST]
    return Split(name=name, labels=labels, train=kept, validation=validation, test=test)


@cache
def _pools(name: str) -> tuple[list[Row], ...]:
    """The published training and test part, or everything in one."""
    if name in ("tweets", "rotten-tomatoes"):
        both = source_rows(name)
        return (unique([*both["train"], *both["test"]]),)
    if name == "spam":
        return (unique(_mails()),)
    if name == "intent":
        return (unique((text.removeprefix("Utterance: "), label) for text, label in _big("intent_recognition")),)
    if name == "fever":
        return (unique((_claim(text), label) for text, label in _big("fact_checker/fever")),)
    if name.startswith("multiemo-"):
        rows = _big(f"multiemo/{name.removeprefix('multiemo-')}_sentence_en")
        # sentences that say something; more than enough of them
        return (unique(row for row in rows if len(row[0].split()) >= 5)[:6000],)
    both = source_rows(name)
    return unique(both["train"]), unique(both["test"])


def _big(name: str) -> list[Row]:
    examples = json.loads(bigbench(name).read_text())["examples"]
    scored = ((e["input"], e["target_scores"]) for e in examples)
    return [(text, max(scores, key=scores.__getitem__)) for text, scores in scored]


def _claim(text: str) -> str:
    """The claim alone, without date and question."""
    return text.split("following claim was made: ")[-1].split("\nQ:")[0]


def _mails() -> list[Row]:
    rows: list[Row] = []
    with tarfile.open(fetch(SPAM), "r:gz") as archive:
        for member in archive:
            parts = member.name.split("/")
            if parts[:2] == ["package", "data"] and member.name.endswith(".json") and len(parts) == 4:
                file = archive.extractfile(member)
                assert file is not None
                rows.append((_body(json.load(file)["text"]), "spam" if parts[2].startswith("spam") else "ham"))
    return sorted(rows)


def _body(mail: str) -> str:
    """Subject and text: the headers would give the label away."""
    head, _, body = mail.partition("\n\n")
    subject = next((line[9:] for line in head.splitlines() if line.lower().startswith("subject: ")), "")
    return " ".join(f"{subject} {body}".split()[:200])
