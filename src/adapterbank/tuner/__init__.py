"""Training in a bank: a PEFT method whose adapters are coefficients on the bank's shared basis.

Importing this package makes the method known to PEFT; do so before loading such an adapter, or use :func:`load`.
"""

from adapterbank.peft_type import register
from adapterbank.tuner.config import NAME, PREFIX, EigenLoraConfig
from adapterbank.tuner.gradients import augment, nearest
from adapterbank.tuner.layer import EigenLoraLayer
from adapterbank.tuner.live import export_lora
from adapterbank.tuner.loading import load
from adapterbank.tuner.lora_start import init_lora
from adapterbank.tuner.model import EigenLoraModel
from adapterbank.tuner.optimizer import optimizer_groups
from adapterbank.tuner.staged import StagedComponents, train_components
from adapterbank.tuner.starts import start_at

register(NAME, EigenLoraConfig, EigenLoraModel, PREFIX)

__all__ = [
    "EigenLoraConfig",
    "EigenLoraLayer",
    "EigenLoraModel",
    "StagedComponents",
    "augment",
    "export_lora",
    "init_lora",
    "load",
    "nearest",
    "optimizer_groups",
    "start_at",
    "train_components",
]
