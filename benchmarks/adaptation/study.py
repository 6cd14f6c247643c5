"""What is run: methods, tasks, seeds, part by part. Choices are made on validation parts, tables on test parts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.adaptation.methods import Method
from benchmarks.adaptation.runs import Run, load_results
from benchmarks.adaptation.sources import Recycled
from benchmarks.adaptation.texts import HELD_OUT, RELATED, SOURCES

SEEDS = (0, 1, 2)
CHOOSING = ("rotten-tomatoes", "intent")
"""Tasks whose validation parts choose the learning rates."""
FACTOR = 3.0
"""Between two rates of a grid."""
WIDEST = 3
"""Steps away from the middle of a grid at which widening ends."""


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
FROM_BANK = lora(8, 1.5e-3, "LoRA from the bank", start="mean")

MAIN = (
    HEAD, LORA, lora(1, 4.5e-3), RANDOM, PAPER, PAPER_BASE, BANK, BANK_MEAN, MIXED, MIXED_MEAN, FROM_BANK,
)  # fmt: skip
ABLATION = (MIXED, RANDOM_GRADIENT, GRADIENT, GRADIENT_16, BANK, RANDOM)
APPENDIX = (
    PAPER_MEAN,
    Method(name="VeRA", kind="VeraConfig", lr=1e-2, config={"r": 256}),
    Method(name="PiSSA", kind="LoraConfig", lr=5e-4, config={"r": 8, "lora_alpha": 8, "init_lora_weights": "pissa"}),
    Method(name="UniLora", kind="UniLoraConfig", lr=1e-2, config={"r": 8, "theta_d_length": 6144}),
    in_bank("base-SVD", k=0, base_directions=32),
    in_bank("bank 16 + random 16", k=16, random_directions=16),
    in_bank("bank 16 + base 16", k=16, base_directions=16),
    in_bank("gradient at 8 bits", k=16, gradient=16, augment={"bits": 8}, gradient_bits=8),
    in_bank("gradient, head not fitted", k=16, gradient=16, augment={"head_steps": 0}),
    in_bank("gradient from all batches", k=16, gradient=16, augment={"most_batches": 20}),
    in_bank("bank 24 + gradient 8", k=24, gradient=8),
    in_bank("core 22 x 22", k=22, train="core"),
    in_bank("free rank 1 beside 32", free_rank=1),
    in_bank("r=2 on bank 32 + random 96", r=2, random_directions=96),
    replace(BANK, name="bank, nearest 3", start={"nearest": 3, "weight": 1.0}),
    in_bank("zero-shot inside", train="head", start="random"),
    in_bank("zero-shot outside", train="head", start="random", k=0, random_directions=32),
)
"""One seed, the two tasks that choose: their tables are the tests of the runs that chose their rates."""


# --- runs -------------------------------------------------------------------------------------------------------------


def recycled(task: str, method: Method, family: str = "private", tasks: Sequence[str] = SOURCES) -> Recycled | None:
    """The bank that a method starts from on a task: every source but the task itself."""
    if not method.needs_bank:
        return None
    kept = tuple(source for source in tasks if source != task)
    return Recycled(subject="encoder", family=family, tasks=kept, fit=method.fit)


def texts(
    part: str,
    methods: Sequence[Method],
    tasks: Sequence[str] = HELD_OUT,
    *,
    seeds: Sequence[int] = SEEDS,
    family: str = "private",
    **fields: Any,
) -> Iterator[Run]:
    """Every method on every task and seed, on MiniLM; the seeds outside, so that a first look comes early."""
    for seed in seeds:
        for task in tasks:
            for method in methods:
                sources = recycled(task, method, family)
                yield Run(part=part, subject="encoder", task=task, method=method, sources=sources, seed=seed, **fields)


def rates(methods: Sequence[Method]) -> Iterator[Run]:
    """Three rates a method, and more beyond an edge that came out best."""
    for method in methods:
        for lr in grid(method):
            yield from texts("rates", [replace(method, lr=lr)], CHOOSING, seeds=SEEDS[:1])


def grid(method: Method) -> list[float]:
    """Rates to try, as far as results tell."""
    if method.config.get("train") == "head":
        return [method.lr]  # nothing but the head is trained
    losses = mean_losses(method.name)
    steps = [-1, 0, 1]
    while len(steps) < 2 * WIDEST + 1 and all(_rate(method, step) in losses for step in steps):
        best = min(steps, key=lambda step: losses[_rate(method, step)])
        if best == steps[0] and best > -WIDEST:
            steps.insert(0, best - 1)
        elif best == steps[-1] and best < WIDEST:
            steps.append(best + 1)
        else:
            break
    return [_rate(method, step) for step in steps]


def _rate(method: Method, step: int) -> float:
    return float(f"{method.lr * FACTOR**step:.3g}")


def mean_losses(name: str) -> dict[float, float]:
    """Mean final validation loss of a method at each rate that was tried on all tasks that choose."""
    found: dict[float, list[float]] = {}
    for line in load_results("rates").values():
        if line["method"]["name"] == name:
            found.setdefault(line["method"]["lr"], []).append(line["result"]["validation"][-1][1])
    return {lr: sum(losses) / len(losses) for lr, losses in found.items() if len(losses) == len(CHOOSING)}


def tuned(methods: Sequence[Method]) -> list[Method]:
    """The methods at their chosen rates."""
    found = []
    for method in methods:
        losses = mean_losses(method.name)
        if not losses:
            raise SystemExit(f"Error: no rate is chosen for {method.name!r}; run the part 'rates' first")
        found.append(replace(method, lr=min(losses, key=losses.__getitem__)))
    return found


PARTS: dict[str, Callable[[], Iterator[Run]]] = {
    "rates": lambda: rates(list({m.name: m for m in (*MAIN, *ABLATION)}.values())),
    "main": lambda: texts("main", tuned(MAIN)),
    "appendix": lambda: rates(APPENDIX),
    "ablation": lambda: texts("ablation", tuned(ABLATION), (*HELD_OUT, *RELATED)),
    "oneseed": lambda: texts("oneseed", [m for m in tuned(MAIN) if m.needs_bank], family="oneseed"),
}
