"""A linear layer with an update on the bank's shared basis, as a PEFT tuner layer."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapterbank.bank.task import task_factors
from adapterbank.codec.rows import unpack_rows
from adapterbank.errors import AdapterBankError
from adapterbank.peft_scaling import ScaledAdapters
from adapterbank.tuner.basis import LayerBasis, sizes_of
from adapterbank.tuner.config import EigenLoraConfig
from adapterbank.tuner.fresh import fresh_weights

BASE = "__base__"
"""PEFT's name for rows of a mixed batch that take no adapter."""


class EigenLoraLayer(ScaledAdapters, BaseTunerLayer):
    """``y = W x + scale * (U @ coef_B) @ (coef_A @ V) @ x``: coefficients are trained, ``U`` and ``V`` are the bank's.

    Per adapter, beside the coefficients: one ``core`` instead of them, a free pair outside the subspace, own copies of
    the components, packed directions of the task's gradient. The basis lies in a buffer container keyed by the hash of
    its recipe: adapters of one bank share it, it moves with the layer, and it is no parameter.
    """

    # more names join on the instance when an adapter needs them: empty containers would slow down every walk
    adapter_layer_names: tuple[str, ...] = ("eig_coef_A", "eig_coef_B")
    other_param_names: tuple[str, ...] = ("r", "scaling", "initial_scaling", "basis_of", "dropout", "fixed", "bits")

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        """Wrap a layer; ``kwargs`` go to PEFT's quantisation backend."""
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **kwargs)
        self.eig_coef_A = nn.ParameterDict()
        self.eig_coef_B = nn.ParameterDict()
        # outside of the prefix: transformers puts adapter names into keys that begin with it
        self.shared_V = BufferDict()
        self.shared_U = BufferDict()
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.initial_scaling: dict[str, float] = {}
        self.basis_of: dict[str, LayerBasis] = {}
        self.dropout: dict[str, float] = {}
        self.fixed: dict[str, frozenset[str]] = {}
        """Weights of an adapter that are never trained."""
        self.bits: dict[str, int] = {}
        self.merged_adapters: list[str] = []
        self._active_adapter: str | list[str] = []
        self._disable_adapters = False
        sizes = sizes_of(self.get_base_layer())
        if sizes is None:
            raise AdapterBankError(
                f"{type(base_layer).__name__} is no linear layer; a bank holds updates of those only"
            )
        self.in_features, self.out_features = sizes
        self.is_conv1d = isinstance(self.get_base_layer(), Conv1D)

    # --- adapters ---------------------------------------------------------------------------------------------------

    def update_layer(
        self, adapter_name: str, basis: LayerBasis, config: EigenLoraConfig, *, activate: bool = True
    ) -> None:
        """Add an adapter.

        Args:
            adapter_name: Its name.
            basis: Of this layer.
            config: Of the adapter.
            activate: Whether flags of the active adapters are set again, as PEFT does for a new layer.
        """
        if basis.fold > 1 and (config.r != basis.fold or config.train == "core"):
            raise AdapterBankError(f"this flat bank has factors of rank {basis.fold}: give r={basis.fold} and no core")
        self._share(basis, persistent=config.save_basis)
        self.r[adapter_name] = config.r
        self.scaling[adapter_name] = self.initial_scaling[adapter_name] = config.scaling
        self.basis_of[adapter_name] = basis
        self.dropout[adapter_name] = config.lora_dropout
        self.bits[adapter_name] = config.gradient_bits
        fixed = {"eig_gradient_in", "eig_gradient_out"}
        weights = fresh_weights(basis, config, (self.in_features, self.out_features))
        if config.train == "components" or basis.is_edge:
            weights |= {"eig_V": self.shared_V[basis.id].clone(), "eig_U": self.shared_U[basis.id].clone()}
        if config.train == "head":
            fixed |= weights.keys()
        self.fixed[adapter_name] = frozenset(fixed)
        for name, value in weights.items():
            self.set_weight(name, adapter_name, value)
        if activate:
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_weight(self, name: str, adapter_name: str, value: Tensor) -> None:
        """Put in or replace one weight of an adapter, on the base layer's device; trained if its adapter is."""
        container = getattr(self, name, None)
        if container is None:
            container = nn.ParameterDict()
            setattr(self, name, container)
            self.adapter_layer_names = (*self.adapter_layer_names, name)
        trained = adapter_name in self.trained_adapters() and name not in self.fixed[adapter_name]
        container[adapter_name] = nn.Parameter(value.to(self._device()), requires_grad=trained)

    def weights(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """All weights of an adapter by the names of their containers."""
        containers = {name: getattr(self, name) for name in self.adapter_layer_names}
        return {name: c[adapter_name] for name, c in containers.items() if adapter_name in c}

    def own_components(self, adapter_name: str) -> None:
        """Give an adapter own copies of its components, to be trained; the bank's stay as they are."""
        if "eig_V" in self.weights(adapter_name):
            return
        basis = self.basis_of[adapter_name]
        self.set_weight("eig_V", adapter_name, self.shared_V[basis.id].detach().clone())
        self.set_weight("eig_U", adapter_name, self.shared_U[basis.id].detach().clone())

    def _device(self) -> torch.device | None:
        device: torch.device | None = self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        return device

    def trained_adapters(self) -> set[str]:
        """Adapters with a weight that asks for gradients; the flags themselves, since anybody may set those."""
        containers = [getattr(self, name) for name in self.adapter_layer_names]
        # not by item: ParameterDict's own access is ten times slower, and there may be hundreds of adapters
        return {key for c in containers for key, weight in c._parameters.items() if weight.requires_grad}

    def _share(self, basis: LayerBasis, *, persistent: bool) -> None:
        for container, value in ((self.shared_V, basis.V), (self.shared_U, basis.U)):
            if basis.id not in container or (persistent and basis.id in container._non_persistent_buffers_set):
                # persistence is decided when a buffer is registered; a file is loaded into it, so it's no alias
                container.persistent = persistent
                there = container[basis.id] if basis.id in container else value.to(self._device())
                container[basis.id] = there.clone() if persistent else there

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter, and its basis when no other needs it."""
        super().delete_adapter(adapter_name)
        used = {basis.id for basis in self.basis_of.values()}
        for container in (self.shared_V, self.shared_U):
            for key in set(container.keys()) - used:
                del container[key]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters; those that were trained before stop being so.

        As PEFT's, but it touches only adapters whose flags change: PEFT's loop over all of them is what makes the
        400th adapter slow.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        wanted = set() if inference_mode else {name for name in names if name in self.r}
        for name in self.trained_adapters() | wanted:
            self._set_grad(name, name in wanted)
        self._active_adapter = names

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Switch gradients of adapters on or off, whether they're active or not."""
        for name in {adapter_names} if isinstance(adapter_names, str) else set(adapter_names):
            if name in self.r:
                self._set_grad(name, requires_grad)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off; the weights stay."""
        if enabled:
            self.set_adapter(self.active_adapters)
        else:
            self.set_requires_grad(sorted(self.trained_adapters()), False)
        self._disable_adapters = not enabled

    def _set_grad(self, adapter_name: str, value: bool) -> None:
        for name, weight in self.weights(adapter_name).items():
            weight.requires_grad_(value and name not in self.fixed[adapter_name])

    # --- the update ---------------------------------------------------------------------------------------------------

    def factors(self, adapter_name: str) -> tuple[Float[Tensor, "p d_in"], Float[Tensor, "d_out p"]]:
        """``A'`` and ``B'`` of an adapter, the scale in ``B'``; gradients flow to whatever is trained."""
        weights = self.weights(adapter_name)
        V, U = self._components(adapter_name, weights)
        return task_factors(
            weights,
            V,
            U,
            k=self.basis_of[adapter_name].k,
            sizes=(self.in_features, self.out_features),
            scale=self.scaling[adapter_name],
            bits=self.bits[adapter_name],
        )

    def _components(self, adapter_name: str, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        if "eig_V" in weights:
            return weights["eig_V"], weights["eig_U"]
        key, leading = self.basis_of[adapter_name].id, _leading(weights)
        return self.shared_V[key].to(leading.dtype), self.shared_U[key].to(leading.dtype)

    def basis(self, adapter_name: str) -> tuple[Float[Tensor, "k_in d_in"], Float[Tensor, "d_out k_out"]]:
        """Shared directions of an adapter, without means, on the CPU."""
        shared, key = self.basis_of[adapter_name], self.basis_of[adapter_name].id
        V, U = self.shared_V[key].detach().float().cpu(), self.shared_U[key].detach().float().cpu()
        return V[: shared.k[0]], U[:, : shared.k[1]]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The dense update in the base weight's own orientation."""
        A, B = self.factors(adapter)
        return (B @ A).T if self.is_conv1d else B @ A

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Always: the update is a LoRA of rank ``r`` plus the free rank."""
        return True

    def adapted(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the updates of the active adapters, or of each row's own (``adapter_names``)."""
        adapter_names: Sequence[str] | None = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            output: Tensor = self.base_layer(x, *args, **kwargs)
            return output
        if adapter_names is not None:
            return self._mixed_batch(x, adapter_names, *args, **kwargs)
        result: Tensor = self.base_layer(x, *args, **kwargs)  # (..., d_out)
        if self.merged:
            return result
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for name in self.active_adapters:
            if name in self.r:  # PEFT activates by name; a name may skip this layer
                result = self._plus(result, x, name)
        return result

    def _plus(self, result: Float[Tensor, "... d_out"], x: Float[Tensor, "... d_in"], name: str) -> Tensor:
        weights = self.weights(name)
        h = self._cast_input_dtype(x, _leading(weights).dtype)
        if self.dropout[name]:
            h = F.dropout(h, self.dropout[name], self.training)
        tokens, basis = h.numel() // self.in_features, self.basis_of[name]
        if basis.fold == 1 and cheaper_through_basis(self.r[name], max(basis.k), tokens, torch.is_grad_enabled()):
            return result + self._through_basis(h, name, weights).to(result.dtype)
        A, B = self.factors(name)
        return result + F.linear(F.linear(h, A), B).to(result.dtype)

    def _through_basis(self, h: Float[Tensor, "... d_in"], name: str, weights: Mapping[str, Tensor]) -> Tensor:
        """The update's output without ``A'`` and ``B'``: autograd then keeps ``k`` values a token, not ``d_in``."""
        V, U = self._components(name, weights)
        (k_in, k_out), scale = self.basis_of[name].k, self.scaling[name]
        z = F.linear(h, V)  # (..., k_in), and the product with the mean row of a centred basis
        if "eig_core" in weights:
            z = F.linear(z, scale * weights["eig_core"])  # (..., k_out)
        else:
            coef_A, coef_B = weights["eig_coef_A"], weights["eig_coef_B"]
            if len(V) > k_in:  # means count once in every row
                coef_A, coef_B = F.pad(coef_A, (0, 1), value=1.0), F.pad(coef_B, (0, 0, 0, 1), value=1.0)
            if "eig_gradient_in" in weights:
                own = unpack_rows(weights["eig_gradient_in"], self.in_features, self.bits[name]).to(h.dtype)
                z = torch.cat([z, F.linear(h, own)], dim=-1)
            z = F.linear(F.linear(z, coef_A), scale * coef_B)  # (..., k_out)
        if "eig_gradient_out" in weights:
            own = unpack_rows(weights["eig_gradient_out"], self.out_features, self.bits[name]).to(h.dtype)
            out = F.linear(z[..., :k_out], U) + z[..., k_out:] @ own
        else:
            out = F.linear(z, U)
        if "eig_free_A" in weights:
            out = out + F.linear(F.linear(h, weights["eig_free_A"]), scale * weights["eig_free_B"])
        return out

    def _mixed_batch(self, x: Tensor, adapter_names: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        if len(x) != len(adapter_names):
            raise ValueError(f"adapter_names has {len(adapter_names)} names for {len(x)} rows; give one for each")
        if self.merged:
            raise ValueError("adapter_names can't be used while adapters are merged; call unmerge_adapter first")
        result: Tensor = self.base_layer(x, *args, **kwargs).clone()
        for name in sorted(set(adapter_names) & self.r.keys()):
            rows = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=x.device)
            result[rows] = self._plus(result[rows], x[rows], name)
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add updates to the base weight.

        Args:
            safe_merge: On a copy, which becomes the weight only if it is finite.
            adapter_names: By default all active ones.

        Raises:
            ValueError: If a merged weight is not finite, with ``safe_merge``.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.r:
                continue
            weight = self.get_base_weight()
            delta = self.get_delta_weight(name).detach().to(weight.dtype)
            if safe_merge:
                weight = weight + delta
                if not weight.isfinite().all():
                    raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            else:
                weight += delta
            self.set_base_weight(weight)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take all merged updates out of the base weight again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            weight = self.get_base_weight()
            weight -= self.get_delta_weight(self.merged_adapters.pop()).detach().to(weight.dtype)
            self.set_base_weight(weight)


class Linear(nn.Module, EigenLoraLayer):
    """``torch.nn.Linear``, its quantised kin and transformers' ``Conv1D`` with updates on a shared basis."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, basis: LayerBasis, config: EigenLoraConfig, **kwargs: Any
    ) -> None:
        """Wrap ``base_layer`` and add the first adapter."""
        super().__init__()
        EigenLoraLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, basis, config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """See :meth:`EigenLoraLayer.adapted`."""
        return self.adapted(x, *args, **kwargs)

    def __repr__(self) -> str:
        return "eigenlorax." + super().__repr__()

    def extra_repr(self) -> str:
        """Names the quantisation backend, as PEFT's layers do."""
        return str(quantization_extra_repr(self))


def _leading(weights: Mapping[str, Tensor]) -> Tensor:
    return weights["eig_core"] if "eig_core" in weights else weights["eig_coef_A"]


def cheaper_through_basis(r: int, k: int, tokens: int, training: bool) -> bool:
    """Whether ``x V^T coef_A^T coef_B^T U^T`` takes less than building ``A'`` and ``B'`` first.

    Through the basis a token costs ``2 k (d_in + d_out)`` operations, through built factors ``2 r (d_in + d_out)``, and
    these ``2 r k (d_in + d_out)`` once: by operations, built factors win from ``r k / (k - r)`` tokens on (spec 2.8).
    Measured, memory traffic moves that to about ``1024 / (k - r)``; and in training the basis wins nearly always, with
    a fraction of the memory, since ``V`` and ``U`` need no gradients (``benchmarks/results/contraction.json``).
    """
    return training or tokens * (k - r) < 1024
