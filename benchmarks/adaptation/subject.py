"""What a model and its tasks must offer to be studied."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
Sample = tuple[Any, Any]
"""What is shown and what is wanted: a text or image and the index of its label, or two texts."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """One task, drawn by one seed; the test part never meets a choice."""

    name: str
    labels: tuple[str, ...]
    """Empty where the answer is a text."""
    train: Sequence[Sample]
    validation: Sequence[Sample]
    test: Sequence[Sample]


class Subject(Protocol):
    """One frozen model with its tasks."""

    base_id: str
    targets: tuple[str, ...]
    """Ends of the names of the layers that are adapted."""
    head: tuple[str, ...]
    """Modules that every method trains too."""
    source_steps: int
    """Of training an adapter that is recycled."""

    def split(self, task: str, *, train: int, seed: int) -> Split:
        """A task's examples."""
        ...

    def base(self, split: Split) -> nn.Module:
        """The pre-trained model with a fresh head, the same one for the same number of labels."""
        ...

    def batch(self, examples: Sequence[Sample]) -> Batch:
        """What the model takes, labels included; its output then has a ``loss``."""
        ...

    def right(self, logits: Tensor, batch: Batch) -> Tensor:
        """Which examples of a batch the model gets right, as booleans."""
        ...


def in_bfloat16(model: nn.Module) -> nn.Module:
    """The weights of a frozen model's linear layers in bfloat16, so that autocast has nothing to cast."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)
    return model
