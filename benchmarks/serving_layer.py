"""One linear layer, every row with another member: what the adapters add to the base layer's time."""

import copy
import random
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from benchmarks.cases import Case
from benchmarks.served import Family, Gathered, Way, engine_of, ratios


def run(case: Case, seed: int) -> dict[str, Any]:
    """Base layer, members on several numbers of directions, with a private part, and gathered LoRA, in turns."""
    torch.set_num_threads(1)
    fields = case.fields
    d, r, members, rows = (fields[name] for name in ("d", "r", "members", "rows"))
    torch.manual_seed(seed)
    layer, x = nn.Sequential(nn.Linear(d, d, bias=False)).requires_grad_(False), torch.randn(rows, 1, d)
    ways: dict[str, Way] = {"base": (lambda members: nullcontext(), _step(copy.deepcopy(layer), x))}
    reports = {}
    for k, private in (*((k, 0.0) for k in fields["k"]), (fields["private_k"], fields["private"])):
        family = Family(layers={"0": (d, d)}, r=r, k=k, private=private, seed=seed)
        name, model = f"k={k}" + (", private part" if private else ""), copy.deepcopy(layer)
        engine = engine_of(model, family, members)
        ways[name] = (lambda members, engine=engine: engine.adapters([f"a{i}" for i in members]), _step(model, x))
        reports[name] = engine.report().private_work
    model = copy.deepcopy(layer)
    gathered = Gathered(model, Family(layers={"0": (d, d)}, r=r, k=max(fields["k"]), seed=seed), members)
    ways["gathered LoRA"] = (gathered.use, _step(model, x))
    drawn = random.Random(seed)
    batches = [drawn.sample(range(members), rows) for _ in range(fields["rounds"] + 1)]
    found = ratios(ways, batches, repeats=fields["repeats"], seed=seed)
    reached = found[f"k={fields['target_k']}"]["of_base"]
    return {
        "title": case.title,
        **{name: fields[name] for name in ("d", "r", "members", "rows", "rounds")},
        "ways": [{"way": name, **values, "private_work": reports.get(name)} for name, values in found.items()],
        "targets": [
            {"name": f"k={fields['target_k']} over the base", "at_most": fields["at_most"], "reached": reached,
             "met": reached <= fields["at_most"]},
        ],
    }  # fmt: skip


def _step(model: nn.Module, x: torch.Tensor) -> Any:
    def step() -> None:
        with torch.no_grad():
            model(x)

    return step
