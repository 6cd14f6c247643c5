"""One member in the weights for a while, when all rows want the same."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from adapterbank.errors import BankError
from adapterbank.runtime.layer import ServedLayer
from adapterbank.runtime.sparse import SparseMember
from adapterbank.runtime.store import Served


@contextmanager
def written(member: Served, model: nn.Module, layers: Mapping[str, ServedLayer]) -> Iterator[None]:
    """Inside the block, a member's update is in the weights; afterwards these are as they were, bit for bit.

    Args:
        member: Of a bank, or sparse.
        model: Its weights are the base model's.
        layers: Those that the bank's members change, by name.

    Raises:
        BankError: If a weight is quantised, or is another layer's too.
        AdapterError: If a sparse adapter's weight is.
    """
    if isinstance(member, SparseMember):
        overwritten = member.delta.apply_(model, heads=False)
        try:
            yield
        finally:
            member.delta.restore_(model, overwritten)
        return
    changed = {place: layers[place] for place in member.layout.places}
    weights = [layer.weight() for layer in changed.values()]
    _check_untied(model, weights)
    saved = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for (place, layer), weight in zip(changed.items(), weights, strict=True):
                weight += layer.dense(place, member).to(weight)
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, saved, strict=True):
                weight.copy_(value)


def _check_untied(model: nn.Module, weights: Sequence[Tensor]) -> None:
    owners: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(tensor), []).append(name)
    for weight in weights:
        if len(names := owners.get(id(weight), [])) > 1:
            raise BankError(f"{' and '.join(names)} are one tensor: merging would change both; serve by rows")
