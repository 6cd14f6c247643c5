"""How orthogonal two random adapters of one layer are, by kind of mask and size of the layer (SHiRA, figures 4 and 9).

Values are Gaussian, so only the masks differ; all pairs of a size and seed change the same random weight.
"""

from collections.abc import Callable
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from adapterbank.shira import SparseUpdate, awom, awor, masks
from benchmarks.cases import Case

Pair = tuple[SparseUpdate, SparseUpdate]


def run(case: Case, seed: int) -> dict[str, Any]:
    """Every kind at every size."""
    torch.set_num_threads(1)
    fields = case.fields
    rows = []
    for size, seeds in zip(fields["sizes"], fields["seeds"], strict=True):
        for kind, pair in _kinds(fields, size).items():
            dense = kind in ("dense", "LoRA", "sparse LoRA")
            if dense and size > fields["largest_dense"]:
                continue
            count = min(seeds, fields["dense_seeds"]) if dense else seeds
            rows.append({"size": size, "kind": kind, **_measured(pair, count, seed)})
    return {"title": case.title, **{name: fields[name] for name in ("density", "rank", "factor_density")}, "rows": rows}


def _measured(pair: Callable[[torch.Generator], Pair], count: int, seed: int) -> dict[str, Any]:
    pairs = [pair(torch.Generator().manual_seed(1000 * seed + i)) for i in range(count)]
    ratios = [awor(*both) for both in pairs]
    shares = [awom(*both) / float(both[0].values.norm() * both[1].values.norm()) for both in pairs]
    return {
        "seeds": count,
        "awor": fmean(ratios),
        "awor_spread": stdev(ratios),
        "awom_share": fmean(shares),
    }


def _kinds(fields: dict[str, Any], size: int) -> dict[str, Callable[[torch.Generator], Pair]]:
    """Two adapters each, by kind."""
    density, shape = fields["density"], (size, size)
    offsets = (0, masks.stride_of(shape, density) // 2)

    def weight(drawn: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=drawn)

    def factors(drawn: torch.Generator, share: float) -> Tensor:
        shapes = (size, fields["rank"]), (fields["rank"], size)
        B, A = (torch.randn(s, generator=drawn) * (torch.rand(s, generator=drawn) < share) for s in shapes)
        return B @ A

    def sparse(positions: Callable[[torch.Generator], tuple[Tensor, Tensor]]) -> Callable[[torch.Generator], Pair]:
        def pair(drawn: torch.Generator) -> Pair:
            one, other = (
                SparseUpdate(positions=where, values=torch.randn(len(where), generator=drawn), shape=shape)
                for where in positions(drawn)
            )
            return one, other

        return pair

    def whole(update: Callable[[torch.Generator], Tensor]) -> Callable[[torch.Generator], Pair]:
        everywhere = torch.arange(size * size, dtype=torch.int32)

        def pair(drawn: torch.Generator) -> Pair:
            one, other = (
                SparseUpdate(positions=everywhere, values=update(drawn).flatten(), shape=shape) for _ in range(2)
            )
            return one, other

        return pair

    def one_mask(drawn: torch.Generator) -> tuple[Tensor, Tensor]:
        positions = masks.wm(weight(drawn), density)
        return positions, positions

    def own_masks(drawn: torch.Generator) -> tuple[Tensor, Tensor]:
        drawn_weight = weight(drawn)
        return masks.wm(drawn_weight, density), masks.wm(drawn_weight, density, part=1)

    return {
        "struct, own rows": sparse(lambda _: tuple(masks.struct(shape, density, offset=o) for o in offsets)),
        "struct, one mask": sparse(lambda _: (masks.struct(shape, density),) * 2),
        "wm, one mask": sparse(one_mask),
        "wm, own masks": sparse(own_masks),
        "sparse LoRA": whole(lambda drawn: factors(drawn, fields["factor_density"])),
        "LoRA": whole(lambda drawn: factors(drawn, 1.0)),
        "dense": whole(weight),
    }
