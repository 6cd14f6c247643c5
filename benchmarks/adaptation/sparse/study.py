"""What is run of sparse adapters: five masks and LoRA at one count, then what those adapters do together."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.adaptation.methods import Method
from benchmarks.adaptation.runs import Job, Run
from benchmarks.adaptation.sparse.measured import Fusion, Sweep
from benchmarks.adaptation.study import COMMON_HEAD_RATE, FIRST, LORA, SEEDS, TEXTS, lora, rates, runs, tuned

TASKS = ("rotten-tomatoes", "intent", "tweets")
"""Of the held-out ones: opinion, intent, authorship; on each an adapter is worth several points beside the head."""
RANK = 2
DENSITY = 1 / 96
"""Of MiniLM's 384 x 384: 1,536 values a layer, as many as a LoRA of rank 2 trains; struct comes to 1,533."""
SETTING = replace(TEXTS, rates=("sparse",))


def sparse(name: str, mask: str, **config: Any) -> Method:
    """A sparse adapter; the head's rate is the one that the study's search found best beside most adapters."""
    fields = {"mask": mask, "density": DENSITY, **config}
    return Method(name=name, kind="sparse", lr=1e-2, head_lr=COMMON_HEAD_RATE, config=fields)


EQUAL = replace(lora(RANK, 3e-3), head_lr=COMMON_HEAD_RATE)
"""LoRA at the masks' count."""
MASKS = tuple(sparse(mask, mask) for mask in ("struct", "rand", "wm", "grad", "snip"))
BY_NAME = {method.name: method for method in MASKS}
COMPARED = (EQUAL, *MASKS)
OWN: Mapping[str, Callable[[int, int], dict[str, Any]]] = {
    "wm": lambda place, seed: {"part": place},
    "struct": lambda place, seed: {"offset": place},
    "rand": lambda place, seed: {"seed": seed + 10 * place},
}
"""By mask, what gives the task at a place, trained with a seed, positions of its own; the first keeps the mask's."""


# --- runs -------------------------------------------------------------------------------------------------------------


def _masks() -> Iterator[Run]:
    return runs("sparse", SETTING, tuned(SETTING, COMPARED), TASKS, keep=True)


def _fusions() -> Iterator[Job]:
    """First what needs no more adapters than the masks' table has trained."""
    chosen = {method.name: method for method in tuned(SETTING, COMPARED)}
    for name, method in chosen.items():
        for seed in SEEDS:
            yield _fusion(f"{name}, one mask" if name in OWN else name, [method] * len(TASKS), seed)
    for name in OWN:
        for seed in SEEDS:
            own = [_own(chosen[name], place, seed) for place in range(len(TASKS))]
            yield _fusion(f"{name}, own masks", own, seed)
    for seed in SEEDS:
        yield _fusion(LORA.name, tuned(TEXTS, [LORA]) * len(TASKS), seed)


def _own(method: Method, place: int, seed: int) -> Method:
    if not place:
        return method
    return replace(method, config={**method.config, **OWN[method.name](place, seed)})


def _fusion(name: str, methods: Sequence[Method], seed: int) -> Fusion:
    adapters = tuple(
        next(runs("sparse", SETTING, [method], [task], seeds=[seed], keep=True))
        for task, method in zip(TASKS, methods, strict=True)
    )
    return Fusion(name=name, adapters=adapters, seed=seed)


def _sweeps() -> Iterator[Sweep]:
    for run in runs("sparse", SETTING, tuned(SETTING, COMPARED), TASKS, seeds=FIRST, keep=True):
        yield Sweep(adapter=run)


PARTS: dict[str, Callable[[], Iterator[Job]]] = {
    "sparse-rates": lambda: rates("sparse", SETTING, COMPARED, heads=False, keep=True),
    "sparse": _masks,
    "sparse-fusion": _fusions,
    "sparse-strength": _sweeps,
}
