"""What a task trained in a bank is: ``EigenLoraConfig``, in PEFT's form."""

import copy
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from peft import PeftConfig

from adapterbank.adapters.names import base_model_id
from adapterbank.adapters.task import TRAINED
from adapterbank.bank import Bank
from adapterbank.codec.rows import ROW_BITS
from adapterbank.errors import AdapterBankError
from adapterbank.peft_type import add_peft_type

NAME = "EIGENLORAX"
PREFIX = "eig_"
EIGENLORAX = add_peft_type(NAME)


@dataclass
class EigenLoraConfig(PeftConfig):
    """A task on a bank's shared basis: ``dW = scale * (U @ coef_B) @ (coef_A @ V)`` (EigenLoRAx, arXiv:2502.04700).

    Raises:
        AdapterBankError: If fields contradict each other.
    """

    bank: Any = None
    """A ``Bank``, its directory or hub id. Only its name is saved; on loading the bank is found by argument, by the
    environment variable ``ADAPTERBANK_BANK``, beside the adapter, or by hub id."""
    r: int = 8
    """Rank of the update."""
    k: int | None = None
    """Directions of the bank a side, by default 32; see ``Bank.basis`` where a module has fewer. 0: none, only those
    that are added below."""
    lora_alpha: float | int | None = None
    """The update is scaled by ``lora_alpha / r``; by default by 1."""
    lora_dropout: float = 0.0
    """On the input of the update, as LoRA's."""
    target_modules: Any = None
    """By default all modules of the bank that the model has; otherwise as in PEFT."""
    exclude_modules: Any = None
    layers_to_transform: Any = None
    layers_pattern: Any = None
    modules_to_save: Any = None
    """Modules beside the adapters that are trained and saved whole, e.g. a task head."""
    train: str = "coefficients"
    """``coefficients``; ``core``: one ``k_out x k_in`` matrix instead; ``components``: coefficients and own copies of
    the basis (the paper's init variant); ``head``: random coefficients stay frozen (its zero-shot variant)."""
    start: str = "base"
    """``base``: the base model itself (``coef_B = 0``); ``random``: coefficients from [-0.5, 0.5), as the official
    code; ``mean``: the mean of the members; ``member:NAME``: a member."""
    use_mean: bool = False
    """Add the mean rows of a centred basis (banks fitted with ``method="eigenlora"``); the base model is then no
    possible start."""
    free_rank: int = 0
    """Rank of a private pair outside the shared subspace, which starts at zero."""
    edge_layers: int = 0
    """So many of the first and of the last layers train own copies of their basis too."""
    random_directions: int = 0
    """Seeded random directions beside the bank's; drawn again on loading, not stored."""
    base_directions: int = 0
    """Leading directions of the base weight beside the bank's; computed again on loading, not stored."""
    gradient_directions: int = 0
    """Directions of the task's own gradient, put in by ``adapterbank.tuner.augment``; stored with the adapter."""
    gradient_bits: int = 4
    """Bits of a value of those: 4 or 8."""
    seed: int = 0
    """Of the random directions."""
    save_basis: bool = False
    """Store the basis with the adapter, which is then loaded without the bank."""
    bank_fingerprint: str | None = None
    """Set on use: which basis the coefficients mean."""
    bank_members: int | None = None
    """Set on use: derived directions come from so many members, the first ones."""
    basis_probe: float | None = None
    """Set on use: tells whether a basis computed again came out the same."""
    base_probe: float | None = None
    """Set on use: the same for ``base_directions``, which another precision of the base weight changes."""
    basis_shapes: dict[str, list[int]] | None = field(default=None)
    """Set with ``save_basis``: ``[k_in, k_out, fold, rows of V, columns of U, is_edge]`` by ``layer:basis id``."""
    is_saved: bool = False
    """Set in files: the fingerprint is that of trained coefficients, so no other bank will do."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = EIGENLORAX
        self.use_bank(self.bank)
        # the name in a file is only where to begin to look
        self.is_given = self.bank is not None and not self.is_saved
        self.origin: str | None = None
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, (list, tuple)) else value)
        self._check()

    def _check(self) -> None:
        if self.r < 1:
            raise AdapterBankError(f"r={self.r} is no rank; give at least 1")
        if self.lora_alpha is not None and not 0 < abs(self.lora_alpha) < float("inf"):
            raise AdapterBankError(f"lora_alpha={self.lora_alpha} makes no update; give another, or leave it out")
        if self.train not in TRAINED:
            raise AdapterBankError(f"train={self.train!r} is unknown; choose from {', '.join(TRAINED)}")
        if self.start not in ("base", "random", "mean") and not self.start.startswith("member:"):
            raise AdapterBankError(f"start={self.start!r} is unknown; choose base, random, mean or member:NAME")
        if self.use_mean and ((self.start == "base" and not self.inference_mode) or self.train == "core"):
            raise AdapterBankError("with use_mean, choose start='random', 'mean' or 'member:NAME', and no core")
        if self.use_mean and self.gradient_directions:
            raise AdapterBankError("a basis with means takes no gradient_directions; leave use_mean out")
        if self.gradient_bits not in ROW_BITS:
            raise AdapterBankError(f"gradient_bits={self.gradient_bits}: directions are stored at 4 or 8 bits")
        counts = ("free_rank", "edge_layers", "random_directions", "base_directions", "gradient_directions")
        for name in counts:
            if getattr(self, name) < 0:
                raise AdapterBankError(f"{name}={getattr(self, name)} is negative")
        if self.layers_pattern and not self.layers_to_transform:
            raise AdapterBankError("layers_pattern does nothing without layers_to_transform")
        own = self.train != "coefficients" or self.edge_layers
        if own and self.gradient_directions:
            raise AdapterBankError("gradient_directions go with train='coefficients' and without edge_layers")

    @property
    def scaling(self) -> float:
        """Factor of the update."""
        return 1.0 if self.lora_alpha is None else float(self.lora_alpha) / self.r

    def use_bank(self, bank: Bank | str | os.PathLike[str] | None) -> None:
        """Take this bank and no other, open or as a path; none: nothing changes."""
        if bank is not None:
            self.bank = bank if isinstance(bank, Bank) else os.fspath(bank)
            self.is_given = True

    def to_dict(self) -> dict[str, Any]:
        """Fields for ``adapter_config.json``: the bank by its name, never by a path, and no start, which is over."""
        data = {f.name: copy.deepcopy(getattr(self, f.name)) for f in fields(self) if f.name != "bank"}
        # sets have no order of their own, and equal tasks should have equal files
        data |= {name: sorted(value) for name, value in data.items() if isinstance(value, set)}
        name = self.bank.name if isinstance(self.bank, Bank) else base_model_id(self.bank)
        return data | {"bank": name, "start": "base", "is_saved": True}

    def __deepcopy__(self, memo: dict[int, Any]) -> "EigenLoraConfig":
        # copies share the open bank: it may hold changes that are not saved, and is nobody's to copy
        copied = copy.copy(self)
        copied.__dict__.update(copy.deepcopy({k: v for k, v in self.__dict__.items() if k != "bank"}, memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        # an open bank can't travel to another process; its directory can
        place = self.bank.directory if isinstance(self.bank, Bank) else self.bank
        return {**self.__dict__, "bank": None if place is None else os.fspath(place)}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> "EigenLoraConfig":
        """See ``PeftConfig.from_pretrained``; remembers where the adapter lies, because its bank may lie beside it.

        So ``PeftModel.from_pretrained(model, "task", bank="bank")`` works too.
        """
        bank = kwargs.pop("bank", None)
        config: EigenLoraConfig = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        if isinstance(config, cls):  # PEFT gives another method's config for another method's file
            config.use_bank(bank)
            found = Path(pretrained_model_name_or_path, subfolder or "")
            config.origin = str(found) if found.is_dir() else None
        return config
