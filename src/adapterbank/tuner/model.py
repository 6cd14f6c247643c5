"""``EigenLoraModel``: puts the layers into a model, and adds the hundredth adapter as fast as the first."""

import copy
import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, ClassVar

from peft.import_utils import is_torchao_available
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule, check_target_module_exists
from peft.utils.integrations import init_empty_weights
from peft.utils.other import AuxiliaryTrainingWrapper, set_additional_trainable_modules
from torch import Tensor, nn

from adapterbank.errors import AdapterBankError, BankError, MissingFileError
from adapterbank.peft_injection import take_back
from adapterbank.tuner.base_directions import check_base_directions
from adapterbank.tuner.basis import ModelBasis, model_basis
from adapterbank.tuner.config import PREFIX, EigenLoraConfig
from adapterbank.tuner.finding import find_basis
from adapterbank.tuner.layer import BASE, EigenLoraLayer, Linear
from adapterbank.tuner.own_basis import basis_from_shapes, shapes_of
from adapterbank.tuner.starts import start_from, start_weights

TARGETING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


class EigenLoraModel(BaseTuner):
    """A model whose linear layers learn on a bank's basis; made by ``peft.get_peft_model`` and its relatives."""

    prefix: str = PREFIX
    tuner_layer_cls = EigenLoraLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """See ``peft.tuners.tuners_utils.BaseTuner``."""
        # before PEFT's own __init__, which injects the first adapter
        self._bases: dict[Any, ModelBasis] = {}
        self._targets: dict[Any, Any] = {}
        super().__init__(*args, **kwargs)

    # --- putting adapters in ------------------------------------------------------------------------------------------

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """See ``BaseTuner.inject_adapter``; an adapter like an earlier one goes straight to that one's layers.

        An error leaves the model without the adapter.
        """
        config: EigenLoraConfig = self.peft_config[adapter_name]
        basis = self._basis(config)
        self._current = basis  # for the hooks that PEFT calls, layer by layer
        starts = None
        if config.start not in ("base", "random") and not low_cpu_mem_usage and basis.bank is not None:
            starts = start_weights(basis.bank, config.start)
        wish = _wish(config)
        try:
            if state_dict is None and wish in self._targets and not self._is_merged():
                self._add(model, adapter_name, self._targets[wish], basis, low_cpu_mem_usage)
            else:
                super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            mine = {n: m for n, m in model.named_modules() if isinstance(m, EigenLoraLayer) and adapter_name in m.r}
            _check_rank(config, mine, adapter_name)
            if starts is not None and basis.bank is not None:
                start_from(model, basis.bank, basis.modules, adapter_name, starts)
            check_base_directions(config, mine, adapter_name)
        except Exception:  # of whatever kind
            take_back(model, adapter_name)
            raise
        if state_dict is None:
            self._targets[wish] = (list(mine), config.target_modules)
        config.basis_shapes = shapes_of(model, adapter_name) if config.save_basis else None

    def _add(
        self, model: nn.Module, adapter_name: str, targets: Any, basis: ModelBasis, low_cpu_mem_usage: bool
    ) -> None:
        config: EigenLoraConfig = self.peft_config[adapter_name]
        names, target_modules = targets
        config.target_modules = copy.copy(target_modules)
        self._check_new_adapter_config(config)
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            for name in names:
                layer: Any = model.get_submodule(name)
                layer.update_layer(adapter_name, basis.layer(name), config, activate=False)
        # adding an adapter must not change what is trained (as in BaseTuner.inject_adapter)
        heads = [m for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
        flags = [(p, p.requires_grad) for head in heads for p in head.parameters()]
        set_additional_trainable_modules(
            model=model,
            peft_config=config,
            model_config=self.get_model_config(model),
            adapter_name=adapter_name,
            activate_adapter=adapter_name in self.active_adapters,
        )
        for parameter, flag in flags:
            parameter.requires_grad = flag

    def _is_merged(self) -> bool:
        return any(isinstance(m, EigenLoraLayer) and m.merged for m in self.model.modules())

    def _basis(self, config: EigenLoraConfig) -> ModelBasis:
        """Bases of the model's layers for a config, made once for all adapters of one recipe."""
        try:
            bank, basis = find_basis(config)
        except (BankError, MissingFileError):
            if not config.basis_shapes:
                raise
            return basis_from_shapes(config, self.model)
        recipe = (
            basis.fingerprint, config.random_directions, config.seed, config.base_directions, config.use_mean,
            config.edge_layers, id(bank),
        )  # fmt: skip
        if recipe not in self._bases:
            # with the bank itself in it, so that its id stays its own
            self._bases[recipe] = model_basis(config, bank, basis, self.model)
        return self._bases[recipe]

    def _prepare_adapter_config(self, peft_config: EigenLoraConfig, model_config: Any) -> EigenLoraConfig:
        self._exact: frozenset[str] | None = None
        if peft_config.target_modules is None:
            # PEFT takes a full name as chosen, whatever layers_to_transform says, and as the end of longer names
            ends = copy.copy(peft_config)
            ends.target_modules = {name.rpartition(".")[2] for name in self._current.modules}
            chosen = {name for name in self._current.modules if check_target_module_exists(ends, name)}
            self._exact = frozenset(chosen)
            peft_config.target_modules = chosen
        return peft_config

    def _check_target_module_exists(self, peft_config: EigenLoraConfig, key: str) -> Any:
        found = check_target_module_exists(peft_config, key)
        excluded = isinstance(found, _ExcludedModule)
        return found if excluded or self._exact is None else bool(found) and key in self._exact

    def _create_and_replace(
        self,
        peft_config: EigenLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        basis = self._current.layer(current_key)
        if isinstance(target, EigenLoraLayer):
            target.update_layer(adapter_name, basis, peft_config)
            return
        options: dict[str, Any] = {}
        if is_torchao_available():
            with suppress(AttributeError):  # a model that isn't quantised has no such path
                path = operator.attrgetter("hf_quantizer.quantization_config.get_apply_tensor_subclass")
                options["get_apply_tensor_subclass"] = path(self.model)
        layer = Linear(target, adapter_name, basis, peft_config, **options)
        if adapter_name not in self.active_adapters:
            # adding an adapter does not activate it
            layer.set_adapter(self.active_adapters)
        self._replace_module(parent, target_name, layer, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Weights are made in float32, whatever the base model is in; without autocast they take its type."""
        for layer in self.model.modules():
            if not autocast_adapter_dtype and isinstance(layer, EigenLoraLayer) and adapter_name in layer.r:
                dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())[1]
                for name, weight in layer.weights(adapter_name).items():
                    if weight.is_floating_point() and dtype is not None and dtype.is_floating_point:
                        layer.set_weight(name, adapter_name, weight.detach().to(dtype))

    # --- mixed batches ------------------------------------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names is for inference: call model.eval() first")
        unknown = set(names) - {BASE} - self.peft_config.keys()
        if unknown:
            raise ValueError(
                f"adapter_names has {', '.join(sorted(unknown))}; the model has {', '.join(self.peft_config)}"
            )
        beams = kwargs.get("num_beams") or 1
        encoder = self._encoder()
        inside = set() if encoder is None else set(encoder.modules())
        handles = []
        for module in self.modules():
            if isinstance(module, (EigenLoraLayer, AuxiliaryTrainingWrapper)):
                # beams repeat each row, in the decoder only
                own = list(names) if module in inside else [name for name in names for _ in range(beams)]
                handles.append(module.register_forward_pre_hook(partial(_with_names, own), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _encoder(self) -> nn.Module | None:
        config = getattr(self.model, "config", None)
        if not getattr(config, "is_encoder_decoder", False):
            return None
        found: nn.Module | None = self.model.get_encoder()
        return found

    # --- saving, and processes that train together --------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: EigenLoraConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Coefficients, and of the bases only this adapter's own, if it asks for it."""
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        mine = {
            f"{name}.{container}.{layer.basis_of[adapter_name].id}".removeprefix(".")
            for name, layer in model.named_modules()
            if isinstance(layer, EigenLoraLayer) and adapter_name in layer.basis_of and config.save_basis
            for container in ("shared_V", "shared_U")
        }
        return {key: value.contiguous() for key, value in found.items() if key in mine or not _is_basis(key)}

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Names of the bases for ``DistributedDataParallel``, which would send every buffer around at every step.

        Each process has read the same bank. A ``PeftModel`` hands out this list as its own, hence the prefix.
        """
        return [f"base_model.{name}" for name, _ in self.named_buffers() if _is_basis(name)]


def _is_basis(key: str) -> bool:
    return ".shared_V." in key or ".shared_U." in key


def _check_rank(config: EigenLoraConfig, layers: Mapping[str, EigenLoraLayer], adapter_name: str) -> None:
    """Refuse a rank that no layer can have; where a few have less, their coefficients are merely too many."""
    bases = [layer.basis_of[adapter_name] for layer in layers.values()]
    most = max((min(basis.k) * basis.fold for basis in bases), default=config.r)
    if config.r > most + config.gradient_directions and config.train != "core":
        raise AdapterBankError(
            f"r={config.r} is more than any layer's basis has directions, {most}: use a smaller r, add adapters to the "
            "bank, or set random_directions"
        )


def _wish(config: EigenLoraConfig) -> tuple[str | None, ...]:
    """What decides which layers a config adapts."""
    fields = (getattr(config, name) for name in TARGETING)
    return (*(repr(sorted(f) if isinstance(f, set) else f) for f in fields), config.bank_fingerprint)


def _with_names(names: list[str], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, kwargs | {"adapter_names": names}
