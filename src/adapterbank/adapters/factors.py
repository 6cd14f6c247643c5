"""One adapted linear layer: the two LoRA factors and their scale."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from adapterbank.errors import AdapterError


@dataclass(frozen=True, kw_only=True)
class ModuleShape:
    """Sizes of one adapted module, known from a file's header alone."""

    rank: int
    d_in: int
    d_out: int


@dataclass(frozen=True, kw_only=True, eq=False)
class LoraFactors:
    """The update of one module, ``dW = scale * B @ A``.

    ``dW`` is always ``(d_out, d_in)``, also where the base stores its weight transposed (GPT-2's ``Conv1D``, PEFT's
    ``fan_in_fan_out``): PEFT's ``lora_A`` and ``lora_B`` have the same shapes there.

    Raises:
        AdapterError: If A and B disagree about the rank, or the scale is not finite.
    """

    A: Float[Tensor, "r d_in"]
    # not "r" again: that both agree is checked below, in words
    B: Float[Tensor, "d_out r_B"]
    scale: float

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise AdapterError(
                f"A is {tuple(self.A.shape)} and B is {tuple(self.B.shape)}: expected A (r, d_in) and B (d_out, r)"
            )
        if not math.isfinite(self.scale):
            raise AdapterError(f"the scale of an update is {self.scale}, expected a finite number")

    @property
    def rank(self) -> int:
        """``r``."""
        return self.A.shape[0]

    @property
    def d_in(self) -> int:
        """Features that come in."""
        return self.A.shape[1]

    @property
    def d_out(self) -> int:
        """Features that go out."""
        return self.B.shape[0]

    def update(self) -> Float[Tensor, "d_out d_in"]:
        """The dense update in float32."""
        dW: Tensor = self.scale * (self.B.to(torch.float32) @ self.A.to(torch.float32))
        return dW
