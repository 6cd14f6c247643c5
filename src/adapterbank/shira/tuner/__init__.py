"""Training sparse adapters by PEFT. Importing this package makes the method known to PEFT."""

from adapterbank.peft_type import register
from adapterbank.shira.files import TYPE
from adapterbank.shira.tuner.calibration import calibrate
from adapterbank.shira.tuner.config import PREFIX, ShiraTunerConfig
from adapterbank.shira.tuner.layer import SparseLayer
from adapterbank.shira.tuner.model import ShiraTunerModel
from adapterbank.shira.tuner.optimizer import optimizer_groups

register(TYPE, ShiraTunerConfig, ShiraTunerModel, PREFIX)

__all__ = ["ShiraTunerConfig", "ShiraTunerModel", "SparseLayer", "calibrate", "optimizer_groups"]
