"""``ShiraTunerModel``: puts sparse layers into a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from adapterbank.errors import AdapterBankError
from adapterbank.peft_injection import take_back
from adapterbank.shira.tuner.config import PREFIX, ShiraTunerConfig
from adapterbank.shira.tuner.layer import Linear, SparseLayer


class ShiraTunerModel(BaseTuner):
    """A model of which one or two per cent of some weights are trained; made by ``peft.get_peft_model``."""

    prefix: str = PREFIX
    tuner_layer_cls = SparseLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """See ``BaseTuner.inject_adapter``; the config then says what the adapter changes.

        An error leaves the model without the adapter.
        """
        for layer in model.modules():
            if isinstance(layer, SparseLayer) and layer.merged:
                layer.unmerge()  # PEFT would do so afterwards, when the mask is chosen already
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        except Exception:  # of whatever kind
            take_back(model, adapter_name)
            raise
        config: ShiraTunerConfig = self.peft_config[adapter_name]
        if not config.is_saved:
            note(config, model, adapter_name)

    def _create_and_replace(
        self,
        peft_config: ShiraTunerConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, SparseLayer):
            there: Any = target
            there.update_layer(adapter_name, peft_config, current_key)
            return
        _check_not_tied(self.model, target)
        layer: Any = Linear(target, adapter_name, peft_config, current_key)
        if adapter_name not in self.active_adapters:
            layer.set_adapter(self.active_adapters)  # adding an adapter does not activate it
        self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: ShiraTunerConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """As PEFT's, with a config that says what the adapter is now: a file may have replaced its positions."""
        layers = layers_of(model, adapter_name).values()
        for layer in layers:
            layer.check_loaded(adapter_name)
            layer.mark(adapter_name)
        note(config, model, adapter_name)
        found: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: ShiraTunerConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As PEFT's; a file that doesn't fit one layer is refused before any layer has changed."""
        found: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        for name, layer in model.named_modules():
            if isinstance(layer, SparseLayer):
                layer.check_fits(adapter_name, found, f"{name}.")
        return found

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise AdapterBankError("sparse adapters change the weight, for all rows alike; group rows by adapter")
        yield


def layers_of(model: nn.Module, adapter_name: str) -> dict[str, SparseLayer]:
    """Layers that an adapter changes, by their names in the base model."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, SparseLayer) and adapter_name in layer.sparse_positions:
            found[name.removeprefix("base_model.model.")] = layer
    return found


def note(config: ShiraTunerConfig, model: nn.Module, adapter_name: str) -> None:
    """Write into a config what its adapter changes: counts, shapes, orientation."""
    layers: Any = layers_of(model, adapter_name)
    config.counts = {name: len(layer.sparse_positions[adapter_name]) for name, layer in layers.items()}
    config.shapes = {name: list(layer.shape) for name, layer in layers.items()}
    config.fan_in_fan_out = any(layer.is_conv1d for layer in layers.values())


def _check_not_tied(model: nn.Module, target: nn.Module) -> None:
    weight, every = getattr(target, "weight", None), model.named_parameters(remove_duplicate=False)
    names = [name.replace(".base_layer", "") for name, parameter in every if parameter is weight]
    if len(names) > 1:
        raise AdapterBankError(
            f"{' and '.join(names)} are one tensor: an adapter of one would change the other too; leave it out of "
            "target_modules, or load the model untied (tie_word_embeddings=False)"
        )
