"""What a sparse adapter is in PEFT: ``ShiraTunerConfig``."""

import copy
from dataclasses import dataclass, fields
from typing import Any

from peft import PeftConfig

from adapterbank.errors import AdapterBankError
from adapterbank.peft_type import add_peft_type
from adapterbank.shira.files import TYPE
from adapterbank.shira.masks import GRADIENT_KINDS, KINDS

PREFIX = "sparse_"
SPARSE_SHIRA = add_peft_type(TYPE)


@dataclass
class ShiraTunerConfig(PeftConfig):
    """A sparse adapter: ``W + S``, where one or two per cent of ``S`` are trained and the rest is zero (SHiRA).

    Raises:
        AdapterBankError: If fields contradict each other.
    """

    density: float = 0.01
    """Share of each layer's weights that is trained."""
    mask: str = "wm"
    """Which weights: ``wm`` (largest), ``rand``, ``struct`` (rows and the diagonal), or ``grad`` and ``snip``, by the
    task's gradient: for these call ``calibrate(model, batches)`` before training. See ``adapterbank.shira.masks``."""
    part: int = 0
    """Of ``wm``, ``grad`` and ``snip``: 0 for the largest, 1 for the next as many. Adapters of different parts of
    ``wm`` share nothing."""
    offset: int = 0
    """Of ``struct``: the first row. Adapters of different offsets share the diagonal only."""
    seed: int = 0
    """Of ``rand``."""
    dora_rank: int = 0
    """0: the values are trained themselves. Else they are those of a DoRA of this rank, of which the mask keeps its
    share (SHiRA-DoRA): more is trained, no more is changed."""
    target_modules: Any = None
    """As in PEFT; by default what LoRA adapts in this model."""
    exclude_modules: Any = None
    layers_to_transform: Any = None
    layers_pattern: Any = None
    modules_to_save: Any = None
    """Modules beside the adapter that are trained and saved whole, e.g. a task head."""
    counts: dict[str, int] | None = None
    """Set on use: values of each layer."""
    shapes: dict[str, list[int]] | None = None
    """Set on use: shape of each layer's weight."""
    calibration: dict[str, Any] | None = None
    """Set by ``calibrate``: ``how`` gradients were summed, and over how many ``batches``."""
    fan_in_fan_out: bool = False
    """Set on use: the layers store their weight as ``(d_in, d_out)``, as GPT-2's Conv1D does."""
    is_saved: bool = False
    """Set in files: the positions are in the file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SPARSE_SHIRA
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, (list, tuple)) else value)
        if type(self.dora_rank) is not int or self.dora_rank < 0:
            raise AdapterBankError(f"dora_rank={self.dora_rank!r} is no rank; give a natural number, or 0 for no DoRA")
        if not self.is_saved:
            self._check()

    def _check(self) -> None:
        if not 0 < self.density <= 1:
            raise AdapterBankError(f"density={self.density} is no share of a layer's weights; give a number in (0, 1]")
        if self.mask not in KINDS:
            raise AdapterBankError(f"mask={self.mask!r} is unknown; choose from {', '.join(KINDS)}")
        if self.part and self.mask not in ("wm", *GRADIENT_KINDS):
            raise AdapterBankError(
                f"part={self.part}: only wm, grad and snip have parts; leave it out with {self.mask}"
            )
        if self.offset and self.mask != "struct":
            raise AdapterBankError(f"offset={self.offset}: only struct has rows; leave it out with {self.mask}")
        if self.layers_pattern and not self.layers_to_transform:
            raise AdapterBankError("layers_pattern does nothing without layers_to_transform")

    def to_dict(self) -> dict[str, Any]:
        """Fields for ``adapter_config.json``."""
        data = {f.name: copy.deepcopy(getattr(self, f.name)) for f in fields(self)}
        data |= {name: sorted(value) for name, value in data.items() if isinstance(value, set)}
        return data | {"is_saved": True}
