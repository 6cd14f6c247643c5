"""Tiny models of every kind, adapters that fit them, and every way to train in a bank."""

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from adapterbank.adapters import LoraAdapter, LoraFactors

HIDDEN = 32


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def bert(labels=3):
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=50,
        num_labels=labels,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=HIDDEN, n_layer=2, n_head=4, vocab_size=50, n_positions=32)).eval()


def t5():
    torch.manual_seed(0)
    config = T5Config(
        d_model=HIDDEN, d_ff=64, num_layers=2, num_heads=4, d_kv=8, vocab_size=50, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config).eval()


MODELS = {"llama": llama, "bert": bert, "gpt2": gpt2, "t5": t5}
TARGETS = {
    "llama": ("q_proj", "v_proj"),
    "bert": ("query", "value"),
    "gpt2": ("c_attn", "c_fc"),
    "t5": ("q", "v"),
}


def factors(d_in, d_out, rank, seed, scale=1.0):
    seeded = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, d_in, generator=seeded), torch.randn(d_out, rank, generator=seeded)
    return LoraFactors(A=A / d_in**0.5, B=B / 4 / d_out**0.5, scale=scale)


def layers_to_adapt(model, targets):
    """``(name, d_in, d_out)`` of the layers whose last name is one of ``targets``."""
    found = []
    for name, layer in model.named_modules():
        if name.rpartition(".")[2] in targets:
            d_out, d_in = layer.weight.shape
            found.append((name, d_out, d_in) if hasattr(layer, "nf") else (name, d_in, d_out))
    return found


def adapters_for(model, targets, *, n=5, rank=4):
    """Unrelated adapters of a model; what they have in common doesn't matter to the tuner's mechanics."""
    layers = layers_to_adapt(model, targets)
    return [
        LoraAdapter.from_factors(
            f"a{i}",
            {name: factors(d_in, d_out, rank, 1000 * i + j) for j, (name, d_in, d_out) in enumerate(layers)},
            base="tiny/base",
        )
        for i in range(n)
    ]


ROWS = {
    "coefficients": {},
    "random-start": {"start": "random"},
    "core": {"train": "core"},
    "components": {"train": "components"},
    "edge": {"edge_layers": 1},
    "free": {"free_rank": 2},
    "augmented": {"random_directions": 3, "base_directions": 2},
    "gradient": {"gradient_directions": 4},
    "random-basis": {"k": 0, "random_directions": 6},
    "scaled": {"lora_alpha": 8.0, "lora_dropout": 0.1},
}
"""Ways to train in a bank."""

SPARSE_ROWS = {
    "wm": {},
    "rand": {"mask": "rand", "seed": 3},
    "struct": {"mask": "struct"},
    "part": {"part": 1},
    "dora": {"dora_rank": 3},
}
"""Ways to train a sparse adapter."""


def eigen(bank, **fields):
    """A config of the usual sizes."""
    from adapterbank.tuner import EigenLoraConfig

    return EigenLoraConfig(**{"bank": bank, "r": 4, "k": 8, **fields})


def sparse(**fields):
    """A config of a sparse adapter that is large enough to be seen."""
    from adapterbank.shira import ShiraTunerConfig

    return ShiraTunerConfig(**{"density": 0.1, **fields})


METHODS = {
    **{f"bank-{name}": lambda bank, row=row, **fields: eigen(bank, **row, **fields) for name, row in ROWS.items()},
    **{f"sparse-{name}": lambda _, row=row, **fields: sparse(**row, **fields) for name, row in SPARSE_ROWS.items()},
}
"""Configs of all ways to train, from a bank and more fields: rows of the battery."""


def adapter_layers(model):
    """Layers that PEFT has put in."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def weights_of(layer, adapter_name="default"):
    """All parameters of an adapter in a layer, of whatever method."""
    found = []
    for container in (getattr(layer, name) for name in layer.adapter_layer_names):
        if adapter_name in container:
            item = container[adapter_name]
            found += list(item.parameters()) if isinstance(item, torch.nn.Module) else [item]
    return found


def perturb(model, adapter_name="default", *, seed=0):
    """Give an adapter weights as if it had been trained."""
    seeded = torch.Generator().manual_seed(seed)
    for layer in adapter_layers(model):
        for weight in weights_of(layer, adapter_name):
            if weight.is_floating_point():
                weight.data += 0.3 * torch.randn(weight.shape, generator=seeded).to(weight)
            else:
                steps = torch.full((len(weight), 1), 0.2).view(torch.uint8)
                codes = torch.randint(0, 256, (len(weight), weight.shape[1] - 4), generator=seeded)
                weight.data = torch.cat([codes.to(torch.uint8), steps], dim=1)
    return model
