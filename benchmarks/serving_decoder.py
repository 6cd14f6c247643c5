"""A whole decoder, every row with another member: decoding and prefill, beside PEFT and gathered LoRA."""

import copy
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.cases import Case
from benchmarks.served import Family, Gathered, Way, engine_of, ratios

TARGETS = ("q_proj", "v_proj")


def run(case: Case, seed: int) -> dict[str, Any]:
    """Every shape of the case, all ways in turns."""
    torch.set_num_threads(1)
    fields = case.fields
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**fields["model"])).requires_grad_(False).eval()
    layers = {
        name: (int(layer.weight.shape[1]), int(layer.weight.shape[0]))
        for name, layer in model.named_modules()
        if name.rpartition(".")[2] in TARGETS
    }
    family = Family(layers=layers, r=fields["r"], k=fields["k"], seed=seed)
    shapes = [_shape(shape, model, family, fields["members"], seed) for shape in fields["shape"]]
    return {
        "title": case.title,
        "parameters": sum(p.numel() for p in model.parameters()),
        **{name: fields[name] for name in ("r", "k", "members")},
        "layers": len(layers),
        "shapes": shapes,
        "targets": [
            target for shape, found in zip(fields["shape"], shapes, strict=True) for target in _targets(shape, found)
        ],
    }


def _targets(shape: dict[str, Any], found: dict[str, Any]) -> list[dict[str, Any]]:
    ways = {way["way"]: way["of_base"] for way in found["ways"]}
    wanted = [(f"{shape['name']} over the base", shape["at_most"], ways["ours"])]
    if "of_gathered" in shape:
        share = (ways["ours"] - 1) / (ways["gathered LoRA"] - 1)
        wanted.append((f"{shape['name']}, overhead of gathered LoRA's", shape["of_gathered"], share))
    return [
        {"name": name, "at_most": most, "reached": reached, "met": reached <= most} for name, most, reached in wanted
    ]


def _shape(shape: dict[str, Any], model: Any, family: Family, members: int, seed: int) -> dict[str, Any]:
    rows, tokens, context = shape["rows"], shape["tokens"], shape["context"]
    models = {name: copy.deepcopy(model) for name in ("ours", "gathered LoRA", "PEFT")}
    engine, gathered = engine_of(models["ours"], family, members), Gathered(models["gathered LoRA"], family, members)
    peft = _Peft(models["PEFT"], family, rows)
    ways: dict[str, Way] = {
        "base": (lambda members: nullcontext(), _step(model, rows, tokens, context)),
        "ours": (
            lambda members: engine.adapters([f"a{i}" for i in members]),
            _step(models["ours"], rows, tokens, context),
        ),
        "gathered LoRA": (gathered.use, _step(models["gathered LoRA"], rows, tokens, context, gathered.use)),
        "PEFT": (peft.use, _step(peft.model, rows, tokens, context, options=peft.options)),
    }
    drawn = random.Random(seed)
    batches = [drawn.sample(range(members), rows) for _ in range(shape["rounds"] + 1)]
    found = ratios(ways, batches, repeats=shape["repeats"], seed=seed)
    engine.close()
    return {**shape, "ways": [{"way": name, **values} for name, values in found.items()]}


class _Peft:
    """PEFT's mixed batches: as many adapters loaded as the batch has rows."""

    def __init__(self, model: Any, family: Family, rows: int) -> None:
        config = LoraConfig(r=family.r, target_modules=list(TARGETS), init_lora_weights=False)
        self.model: Any = get_peft_model(model, config, adapter_name="a0")
        for i in range(1, rows):
            self.model.add_adapter(f"a{i}", config)
        self.model.requires_grad_(False).eval()
        self.options: dict[str, Any] = {"adapter_names": [f"a{i}" for i in range(rows)]}

    def use(self, members: Sequence[int]) -> AbstractContextManager[None]:
        """The ones that are loaded, in turn."""
        return nullcontext()


def _step(
    model: Any,
    rows: int,
    tokens: int,
    context: int,
    use: Callable[[Sequence[int]], Any] | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[[], None]:
    ids = torch.randint(0, 1000, (rows, tokens), generator=torch.Generator().manual_seed(0))
    cache = _cache(model, rows, context, use) if context else None

    def step() -> None:
        with torch.no_grad():
            if cache is None:
                model(input_ids=ids, use_cache=False, **(options or {}))
            else:
                model(input_ids=ids, past_key_values=cache, use_cache=True, **(options or {}))
                cache.crop(-tokens)

    return step


def _cache(model: Any, rows: int, context: int, use: Callable[[Sequence[int]], Any] | None) -> DynamicCache:
    """Keys and values of a context, of whatever adapters."""
    if use is not None:
        use([0] * rows)
    cache, ids = DynamicCache(), torch.randint(0, 1000, (rows, context), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    return cache
