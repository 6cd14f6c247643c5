"""LoRA adapters in and out: the only place that knows PEFT's files, key names, scales and variants."""

from adapterbank.adapters.adapter import LoraAdapter
from adapterbank.adapters.factors import LoraFactors, ModuleShape
from adapterbank.adapters.names import base_model_id, check_name, match_modules

__all__ = ["LoraAdapter", "LoraFactors", "ModuleShape", "base_model_id", "check_name", "match_modules"]
