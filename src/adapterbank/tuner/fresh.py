"""What a new adapter of one layer consists of before training."""

import torch
from torch import Tensor

from adapterbank.codec.rows import packed_width
from adapterbank.tuner.basis import LayerBasis
from adapterbank.tuner.config import EigenLoraConfig


def fresh_weights(basis: LayerBasis, config: EigenLoraConfig, sizes: tuple[int, int]) -> dict[str, Tensor]:
    """Weights of a fresh adapter by the names of their containers, drawn from torch's global generator.

    Args:
        basis: The layer's.
        config: The adapter's.
        sizes: ``(d_in, d_out)`` of the layer.
    """
    (k_in, k_out), (d_in, d_out), q = basis.k, sizes, config.gradient_directions
    rows = config.r // basis.fold
    weights: dict[str, Tensor] = {}
    if config.train == "core":
        weights["eig_core"] = torch.zeros(k_out, k_in)
        if config.start == "random":
            weights["eig_core"] = torch.rand(k_out, k_in) - 0.5
    elif config.start == "random" or config.train == "head":
        # the official code's draw; not the base model
        weights["eig_coef_A"] = torch.rand(rows, k_in + q) - 0.5
        weights["eig_coef_B"] = torch.rand(k_out + q, rows) - 0.5
    else:
        # rows as long as those of a fresh LoRA (kaiming_uniform with a = sqrt(5): variance 1 / (3 d))
        weights["eig_coef_A"] = torch.randn(rows, k_in + q) / (3 * (k_in + q)) ** 0.5
        weights["eig_coef_B"] = torch.zeros(k_out + q, rows)
    if q:
        weights["eig_gradient_in"] = torch.zeros(q, packed_width(d_in, config.gradient_bits), dtype=torch.uint8)
        weights["eig_gradient_out"] = torch.zeros(q, packed_width(d_out, config.gradient_bits), dtype=torch.uint8)
    if config.free_rank:
        weights["eig_free_A"] = torch.randn(config.free_rank, d_in) / (3 * d_in) ** 0.5
        weights["eig_free_B"] = torch.zeros(d_out, config.free_rank)
    return weights
