"""What is run: methods, tasks, seeds, part by part. Choices are made on validation parts, tables on test parts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.adaptation.inventory import Inventory
from benchmarks.adaptation.language import TASKS as LANGUAGE_TASKS
from benchmarks.adaptation.methods import Method
from benchmarks.adaptation.results import load_results
from benchmarks.adaptation.runs import Job, Run
from benchmarks.adaptation.sources import Recycled, Source
from benchmarks.adaptation.subjects import SUBJECTS
from benchmarks.adaptation.texts import HELD_OUT, RELATED, SOURCES
from benchmarks.adaptation.vision import SUBSETS

SEEDS = (0, 1, 2)
FIRST = SEEDS[:1]
FACTOR = 3.0
"""Between two rates of a grid."""
COMMON_HEAD_RATE = 3.33e-3
WIDEST = 3
"""Steps away from the middle of a grid at which widening ends."""
Rates = tuple[float, float]
"""Of a method and of its head."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A model and its tasks."""

    subject: str
    sources: tuple[str, ...]
    """Tasks of the adapters that are recycled."""
    choosing: tuple[str, ...]
    """Tasks whose validation parts choose the learning rates, with the first seed."""
    rates: tuple[str, ...]
    """Parts that hold the runs which choose."""
    examples: int = 320
    steps: int = 80


TEXTS = Setting(subject="encoder", sources=SOURCES, choosing=("rotten-tomatoes", "intent"), rates=("rates", "appendix"))
SHORTLY = replace(TEXTS, rates=("short-rates",), steps=48)
"""Six tenths of the steps, with a schedule and rates of their own."""
FEWER = replace(TEXTS, rates=("few-rates",), examples=48, steps=30)
"""Few examples, with rates of their own too."""
CLASSES = tuple("-".join(subset) for subset in SUBSETS)
VISION = Setting(
    subject="vision", sources=CLASSES, choosing=CLASSES[:2], rates=("vision-rates",), examples=160, steps=40
)
ANSWERS = ("past-tense", "question")
LANGUAGE = Setting(
    subject="language", sources=tuple(LANGUAGE_TASKS), choosing=ANSWERS[:1], rates=("language-rates",), steps=24
)


# --- methods, each at the middle of its grid --------------------------------------------------------------------------


def lora(r: int, lr: float, name: str = "", **start: Any) -> Method:
    """PEFT's LoRA with ``alpha = 2 r``; with ``start``, from the bank."""
    config = {"r": r, "lora_alpha": 2 * r}
    return Method(name=name or f"LoRA r={r}", kind="LoraConfig", lr=lr, config=config, start=start)


def in_bank(
    name: str, *, gradient: int = 0, fit: str = "product", augment: dict[str, Any] | None = None, **config: Any
) -> Method:
    """Coefficients on 32 directions a side, ``r = 8``, unless said otherwise."""
    settings = {"r": 8, "k": 32, "gradient_directions": gradient, **config}
    how = {"count": gradient, **(augment or {})} if gradient else {}
    return Method(name=name, kind="bank", lr=1e-2, config=settings, fit=fit, gradient=how)


HEAD = Method(name="head", kind="head", lr=1e-2)
LORA = lora(8, 1.5e-3)
RANDOM = in_bank("random", k=0, random_directions=32)
PAPER = in_bank("paper", fit="eigenlora", use_mean=True, start="random")
PAPER_MEAN = in_bank("paper, mean start", fit="eigenlora", use_mean=True, start="mean")
PAPER_BASE = in_bank("paper, mean left out", fit="eigenlora")
BANK = in_bank("bank")
BANK_MEAN = in_bank("bank, mean start", start="mean")
MIXED = in_bank("bank + gradient", k=16, gradient=16)
MIXED_MEAN = in_bank("bank + gradient, mean start", k=16, gradient=16, start="mean")
RANDOM_GRADIENT = in_bank("random + gradient", k=0, random_directions=16, gradient=16)
GRADIENT = in_bank("gradient", k=0, gradient=32)
GRADIENT_16 = in_bank("gradient 16", k=0, gradient=16)
MIXED_8 = in_bank("bank 8 + gradient 8", k=8, gradient=8)
MERGED = replace(in_bank("gradient, mean merged", k=0, gradient=32), start={"merged": "mean"})
"""The members' mean without the bank's directions: it is merged into the base model first."""
CORE = in_bank("core 22 x 22", k=22, train="core")
CORE_MEAN = in_bank("core 22 x 22, mean start", k=22, train="core", start="mean")
FROM_BANK = lora(8, 1.5e-3, "LoRA from the bank", start="mean")

VERA = Method(name="VeRA", kind="VeraConfig", lr=1e-2, config={"r": 256})
PISSA = Method(name="PiSSA", kind="LoraConfig", lr=5e-4, config={"r": 8, "lora_alpha": 8, "init_lora_weights": "pissa"})
UNILORA = Method(name="UniLora", kind="UniLoraConfig", lr=1e-2, config={"r": 8, "theta_d_length": 6144})

MAIN = (
    HEAD, LORA, lora(1, 4.5e-3), RANDOM, PAPER, PAPER_BASE, BANK, BANK_MEAN, MIXED, MIXED_MEAN, GRADIENT,
    FROM_BANK, CORE, PISSA, UNILORA,
)  # fmt: skip
SHORT = (MIXED_MEAN, GRADIENT, LORA)
"""With six tenths of the steps."""
FEW = (HEAD, LORA, RANDOM, BANK_MEAN, GRADIENT, MIXED_MEAN, FROM_BANK)
"""With 48 examples."""
JOINING = (LORA, lora(1, 4.5e-3), RANDOM, BANK_MEAN, GRADIENT, MIXED_MEAN, FROM_BANK, CORE)
"""What is measured as a member of the bank."""
RECYCLING = (PAPER, PAPER_BASE, BANK, BANK_MEAN, MIXED_MEAN, FROM_BANK)
"""What is compared between families of source adapters."""
PUBLISHED = (VERA, PISSA, UNILORA)
"""Their rates are searched in the appendix."""
ABLATION = (MIXED_MEAN, MIXED, RANDOM_GRADIENT, GRADIENT, GRADIENT_16, BANK, RANDOM)
ZERO_SHOT = replace(in_bank("zero-shot", train="head", start="random"), head_lr=3e-2)
"""At the rate that the head alone wants."""
APPENDIX = (
    PAPER_MEAN,
    in_bank("base-SVD", k=0, base_directions=32),
    in_bank("bank 16 + random 16", k=16, random_directions=16),
    in_bank("bank 16 + base 16", k=16, base_directions=16),
    in_bank("gradient at 8 bits", k=0, gradient=32, augment={"bits": 8}, gradient_bits=8),
    in_bank("gradient, head not fitted", k=0, gradient=32, augment={"head_steps": 0}),
    in_bank("gradient of 2 batches", k=0, gradient=32, augment={"most_batches": 2}),
    in_bank("gradient of all batches", k=0, gradient=32, augment={"most_batches": 20}),
    in_bank("r=4 on gradient 64", k=0, gradient=64, r=4),
    in_bank("r=16 on gradient 16", k=0, gradient=16, r=16),
    in_bank("bank 24 + gradient 8", k=24, gradient=8),
    in_bank("bank 8 + gradient 24, mean start", k=8, gradient=24, start="mean"),
    in_bank("free rank 1 beside 32", free_rank=1),
    in_bank("trained components", train="components"),
    replace(BANK, name="components in the last fifth", start={"components": 0.2}),
    in_bank("r=2 on bank 32 + random 96", r=2, random_directions=96),
    replace(BANK, name="bank, nearest 3", start={"nearest": 3, "weight": 1.0}),
    replace(ZERO_SHOT, name="zero-shot inside"),
    replace(ZERO_SHOT, name="zero-shot outside", config={**ZERO_SHOT.config, "k": 0, "random_directions": 32}),
)
"""One seed, the two tasks that choose: their tables are the tests of the runs that chose their rates."""
COUNTS = (2, 4, 8, 16)
"""Directions a side; the rank is never larger."""
WITH_K = tuple(in_bank(f"bank, k={k}", k=k, r=min(8, k)) for k in COUNTS)
RANDOM_K = tuple(in_bank(f"random, k={k}", k=0, random_directions=k, r=min(8, k)) for k in COUNTS)
GRADIENT_K = tuple(in_bank(f"gradient, k={k}", k=0, gradient=k, r=min(8, k)) for k in COUNTS)
IN_VISION = (HEAD, lora(4, 1.5e-3), lora(1, 4.5e-3), in_bank("random", k=0, random_directions=16), *WITH_K, MIXED_8)
ANALYTIC = Method(name="analytic", kind="analytic", lr=0.0, config={"k": 32})
PROJECTED = (
    ANALYTIC,
    replace(ANALYTIC, name="its own LoRA", config={"k": 32, "on": "everything"}),
    replace(ANALYTIC, name="on random directions", config={"k": 32, "on": "random"}),
    replace(ANALYTIC, name="its head alone", config={"k": 32, "on": "nothing"}),
)
"""A task's own LoRA, projected on what others share, and what that has to be compared with."""
IN_LANGUAGE = (LORA, RANDOM, BANK_MEAN, GRADIENT, MIXED_MEAN)


# --- runs -------------------------------------------------------------------------------------------------------------


def runs(
    part: str,
    setting: Setting,
    methods: Sequence[Method],
    tasks: Sequence[str],
    *,
    seeds: Sequence[int] = SEEDS,
    family: str = "private",
    most_sources: int | None = None,
    noisy: int = 0,
    **fields: Any,
) -> Iterator[Run]:
    """Every method on every task and seed; the seeds outside, so that a first look comes early.

    A bank holds the adapters of every source but the task itself, or the first ``most_sources`` of them.
    """
    fields = {"examples": setting.examples, "steps": setting.steps, **fields}
    for seed in seeds:
        for task in tasks:
            kept = tuple(source for source in setting.sources if source != task)[:most_sources]
            for method in methods:
                bank = Recycled(subject=setting.subject, family=family, tasks=kept, fit=method.fit, noisy=noisy)
                sources = bank if method.needs_bank or fields.get("join") else None
                yield Run(
                    part=part, subject=setting.subject, task=task, method=method, sources=sources, seed=seed, **fields
                )


def rates(
    part: str, setting: Setting, methods: Sequence[Method], *, heads: bool = True, **fields: Any
) -> Iterator[Run]:
    """The runs that choose a method's rates, or with ``heads=False`` only its own, as far as results tell which."""
    for method in {method.name: method for method in methods}.values():
        tried = [replace(method, lr=lr, head_lr=head_lr) for lr, head_lr in grid(setting, method, heads=heads)]
        yield from runs(part, setting, tried, setting.choosing, seeds=FIRST, **fields)


def grid(setting: Setting, method: Method, *, heads: bool = True) -> list[Rates]:
    """Pairs of the method's rate and its head's to try.

    Three rates with the head's in the middle; then all neighbours of the best pair, a factor of 3 away in one rate or
    the other, until the best has no untried neighbour.
    """
    if method.config.get("train") == "head":
        return [_rates(method, 0, 0)]  # nothing but the head is trained
    losses = mean_losses(setting, method.name)
    places = [(-1, 0), (0, 0), (1, 0)]
    while all(_rates(method, *place) in losses for place in places):
        i, j = min(places, key=lambda place: losses[_rates(method, *place)])
        around = [(i - 1, j), (i + 1, j)]
        if heads and method.kind != "head" and SUBJECTS[setting.subject].head:
            around += [(i, j - 1), (i, j + 1)]
        fresh = [place for place in around if place not in places and max(map(abs, place)) <= WIDEST]
        if not fresh:
            break
        places += fresh
    return [_rates(method, *place) for place in places]


def _rates(method: Method, step: int, head_step: int) -> Rates:
    return float(f"{method.lr * FACTOR**step:.3g}"), float(f"{method.head_lr * FACTOR**head_step:.3g}")


def mean_losses(setting: Setting, name: str) -> dict[Rates, float]:
    """Mean final validation loss of a method at each pair of rates that was tried on all tasks that choose."""
    found: dict[Rates, list[float]] = {}
    for line in (line for part in setting.rates for line in load_results(part).values()):
        tried = line["task"] in setting.choosing and line["seed"] in FIRST
        if line["method"]["name"] == name and tried:
            pair = line["method"]["lr"], line["method"]["head_lr"]
            found.setdefault(pair, []).append(line["result"]["validation"][-1][1])
    return {pair: sum(losses) / len(losses) for pair, losses in found.items() if len(losses) == len(setting.choosing)}


def tuned(setting: Setting, methods: Sequence[Method], like: Method | None = None) -> list[Method]:
    """The methods at their chosen rates, or at those of ``like``."""
    found = []
    for method in methods:
        losses = mean_losses(setting, (like or method).name)
        if not losses:
            raise SystemExit(f"Error: no rate is chosen for {method.name!r}; run {setting.rates[0]!r} first")
        lr, head_lr = min(losses, key=losses.__getitem__)
        found.append(replace(method, lr=lr, head_lr=head_lr))
    return found


def _at_common_head_rate(methods: Sequence[Method]) -> list[Method]:
    """At the rate of the head that the search found best beside most adapters, where they have none of their own."""
    return [replace(m, head_lr=COMMON_HEAD_RATE) if m.head_lr == Method.head_lr else m for m in methods]


def _ablation() -> Iterator[Run]:
    fresh = [method for method in ABLATION if method not in MAIN]  # the others' foreign tasks are in the main table
    yield from runs("ablation", TEXTS, tuned(TEXTS, fresh), HELD_OUT)
    yield from runs("ablation", TEXTS, tuned(TEXTS, ABLATION), RELATED)
    yield from runs("ablation", TEXTS, tuned(TEXTS, [MERGED], like=GRADIENT), (*HELD_OUT, *RELATED), ends_only=True)


def _appendix() -> Iterator[Run]:
    for methods, heads in ((APPENDIX, False), (PUBLISHED, True)):  # those of the main table like all others there
        yield from rates("appendix", TEXTS, _at_common_head_rate(methods), heads=heads, ends_only=True)


def _directions() -> Iterator[Run]:
    for methods, like in ((WITH_K, BANK), (RANDOM_K, RANDOM), (GRADIENT_K, GRADIENT)):
        yield from runs("directions", TEXTS, tuned(TEXTS, methods, like=like), SCALED, seeds=FIRST, ends_only=True)


def _sources() -> Iterator[Run]:
    for count in (2, 4, 8, 12):
        method = tuned(TEXTS, [in_bank(f"bank of {count}", k=16)], like=BANK)
        yield from runs("sources", TEXTS, method, SCALED, most_sources=count, ends_only=True)


def _noise() -> Iterator[Run]:
    for count in (0, 4, 12, 36):
        method = tuned(TEXTS, [in_bank(f"bank with {count} untrained", k=16)], like=BANK)
        yield from runs("noise", TEXTS, method, SCALED, noisy=count, ends_only=True)


def _protocol() -> Iterator[Run]:
    """The source adapters' own tasks, data and steps."""
    like: dict[str, Any] = {"seeds": (Source.seed,), "examples": Source.examples, "ends_only": True}
    for family in ("private", "oneseed"):
        trained = [*tuned(TEXTS, (HEAD, LORA, lora(1, 4.5e-3), BANK)), ZERO_SHOT]
        yield from runs("protocol", TEXTS, trained, PROTOCOL, steps=Source.steps, family=family, **like)
        yield from runs("protocol", TEXTS, PROJECTED, PROTOCOL, steps=0, family=family, **like)


def _banks() -> Iterator[Inventory]:
    for setting, family in ((TEXTS, "private"), (TEXTS, "oneseed"), (VISION, "private"), (LANGUAGE, "private")):
        bank = Recycled(subject=setting.subject, family=family, tasks=setting.sources)
        yield Inventory(part="banks", subject=setting.subject, sources=bank)


SCALED = ("rotten-tomatoes", "intent", "multiemo-hotels")
"""Tasks on which the bank itself is varied."""
PROTOCOL = ("autos-motorcycles", "graphics-windows", "multiemo-medicine", "multiemo-reviews")
"""Sources that play the new task."""
MANY = tuple(task for task in HELD_OUT if task != "intent")
"""Tasks with 2,000 examples."""
PARTS: dict[str, Callable[[], Iterator[Job]]] = {
    "rates": lambda: rates("rates", TEXTS, [m for m in (*MAIN, *ABLATION, CORE_MEAN) if m not in PUBLISHED]),
    "appendix": _appendix,
    "main": lambda: runs("main", TEXTS, tuned(TEXTS, MAIN), HELD_OUT),
    "bytes": lambda: runs("bytes", TEXTS, tuned(TEXTS, JOINING), HELD_OUT, seeds=FIRST, join=(0.1, 0.3)),
    "short-rates": lambda: rates("short-rates", SHORTLY, SHORT),
    "short": lambda: runs("short", SHORTLY, tuned(SHORTLY, SHORT), HELD_OUT),
    "ablation": _ablation,
    "oneseed": lambda: runs(
        "oneseed", TEXTS, tuned(TEXTS, RECYCLING), HELD_OUT, seeds=FIRST, family="oneseed", ends_only=True
    ),
    "directions": _directions,
    "few-rates": lambda: rates("few-rates", FEWER, tuned(TEXTS, FEW), ends_only=True),
    "few-data": lambda: runs(
        "few-data", FEWER, tuned(FEWER, FEW), (*HELD_OUT, *RELATED), seeds=SEEDS[:2], ends_only=True
    ),
    "sources": _sources,
    "noise": _noise,
    "protocol": _protocol,
    "vision-rates": lambda: rates("vision-rates", VISION, IN_VISION, ends_only=True),
    "vision": lambda: runs("vision", VISION, tuned(VISION, IN_VISION), CLASSES, seeds=SEEDS[:2], ends_only=True),
    "language-rates": lambda: rates("language-rates", LANGUAGE, IN_LANGUAGE, ends_only=True),
    "language": lambda: runs("language", LANGUAGE, tuned(LANGUAGE, IN_LANGUAGE), ANSWERS, ends_only=True),
    "more-data": lambda: runs(
        "more-data", TEXTS, tuned(TEXTS, (LORA, GRADIENT, MIXED_MEAN)), MANY, seeds=FIRST, examples=2000, steps=250
    ),
    "banks": _banks,
}
