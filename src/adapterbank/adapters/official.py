"""Files of the papers' own EigenLoRA code (``peft_type`` ``EIGENLORA``): components and loadings of both factors.

Per module and factor ``components (d, K)`` and ``loadings (K, r)``: ``A = loadings^T @ components^T``, and likewise
``B^T``, without mean and at scale 1 (spec.md 2.14). Read from the layout alone; none of that code is used here.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from adapterbank.adapters.factors import LoraFactors
from adapterbank.adapters.tensors import TensorSource
from adapterbank.errors import AdapterError

OFFICIAL_TYPE = "EIGENLORA"
KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.eigenlora_(?P<side>[AB])(\.\w+)?\.(?P<part>components|loadings)"
)


def official_factors(source: TensorSource, where: str) -> tuple[dict[str, LoraFactors], dict[str, Tensor]]:
    """Ordinary factors of each module, and everything else that is stored: task heads.

    Args:
        source: The tensors of the file.
        where: How errors call the adapter.

    Raises:
        AdapterError: If a part is missing or the shapes don't fit.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    extras: dict[str, Tensor] = {}
    for key in source.entries:
        found = KEY.fullmatch(key)
        if found is None:
            extras[key.removeprefix("base_model.model.")] = source.read(key)
        else:
            parts.setdefault(found["module"], {})[f"{found['side']}.{found['part']}"] = source.read(key).to(
                torch.float32
            )
    if not parts:
        raise AdapterError(
            f"{where}: it says {OFFICIAL_TYPE}, but holds no eigenlora_A.components; copy its weights again"
        )
    return {module: _factors(found, f"{where}, {module}") for module, found in sorted(parts.items())}, extras


def _factors(parts: Mapping[str, Tensor], where: str) -> LoraFactors:
    rows = {}
    for side in "AB":
        missing = [part for part in ("components", "loadings") if f"{side}.{part}" not in parts]
        if missing:
            raise AdapterError(f"{where}: eigenlora_{side}.{missing[0]} is missing; copy the file again")
        components, loadings = parts[f"{side}.components"], parts[f"{side}.loadings"]
        if components.ndim != 2 or loadings.ndim != 2 or components.shape[1] != loadings.shape[0]:
            raise AdapterError(
                f"{where}: components of {side} are {tuple(components.shape)}, loadings {tuple(loadings.shape)}; "
                "expected (d, K) and (K, r)"
            )
        rows[side] = loadings.T @ components.T  # (r, d)
    return LoraFactors(A=rows["A"].contiguous(), B=rows["B"].T.contiguous(), scale=1.0)
