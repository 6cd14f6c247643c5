"""What every method is measured by: points of bytes and error on one family of adapters, by the same ruler for all."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adapterbank.adapters import LoraAdapter
from adapterbank.subspace.updates import ThinUpdate, difference_norm, thin_svd

Factors = tuple[Tensor, Tensor]
"""``A (p, d_in)`` and ``B (d_out, p)`` of an update ``B @ A``."""
Restored = Mapping[str, Factors]
"""All updates of one adapter, by module."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """What one setting of one method reaches."""

    setting: str
    bytes: int
    """On disk, basis and everything counted, task heads apart; of rounding and SVD the payload alone."""
    error: float
    """Root mean square over the adapters of ``||dW - dW'||_F / ||dW||_F``."""


class Originals:
    """The adapters that are coded, with the thin SVD of each update."""

    def __init__(self, directories: Sequence[Path]) -> None:
        """Read PEFT directories; all updates stay in memory."""
        self.directories = list(directories)
        self.adapters = [LoraAdapter.load(directory) for directory in directories]
        self.updates: dict[tuple[str, str], ThinUpdate] = {}
        self.energies: dict[str, float] = {}
        self.values = 0
        for adapter in self.adapters:
            for module in adapter.modules:
                factors = adapter.factors(module)
                self.values += factors.A.numel() + factors.B.numel()
                self.updates[adapter.name, module] = thin_svd(factors.A, factors.B, factors.scale)
            spectra = [self.updates[adapter.name, module].S for module in adapter.modules]
            self.energies[adapter.name] = float(sum(S.double().square().sum() for S in spectra))

    def error(self, restored: Callable[[LoraAdapter], Restored]) -> float:
        """RMS error of the updates that ``restored`` gives for each adapter, by module."""
        return rms([self._lost(adapter, restored(adapter)) / self.energies[adapter.name] for adapter in self.adapters])

    def _lost(self, adapter: LoraAdapter, modules: Restored) -> float:
        return sum(difference_norm(self.updates[adapter.name, m], *modules[m]) ** 2 for m in adapter.modules)


def rms(squares: Sequence[float]) -> float:
    """Root mean of squares."""
    return (sum(squares) / len(squares)) ** 0.5


def scaled(adapter: LoraAdapter, tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
    """Factors out of a PEFT state dict, with the adapter's own scales folded in."""
    return {
        m: (tensors[f"{key}.lora_A.weight"].float(), adapter.scales[m] * tensors[f"{key}.lora_B.weight"].float())
        for m in adapter.modules
        for key in [f"base_model.model.{m}"]
    }


def prefix_losses(update: ThinUpdate, A: Tensor, B: Tensor) -> Tensor:
    """``||dW - sum_{j<k} b_j a_j||^2`` for k = 1, 2...: every truncation of one decoded SVD at once."""
    A, B = A.double(), B.double()
    gram = (A @ A.T) * (B.T @ B)
    onto = ((A @ update.Vh.double().T) * (B.T @ update.U.double()) * update.S.double()).sum(1)
    energy = update.S.double().square().sum()
    return (energy - 2 * onto.cumsum(0) + torch.diagonal(gram.cumsum(0).cumsum(1))).clamp_min(0)
