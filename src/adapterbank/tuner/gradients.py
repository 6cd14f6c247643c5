"""What a task's own gradient says before training: directions to add to the basis, and which members point its way.

Only products of gradients with a few vectors are kept, never a dense gradient of any layer.
"""

from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adapterbank.adapters import LoraFactors
from adapterbank.bank import Bank
from adapterbank.calibration import Loss, default_loss, evaluating, fitted_head, held_batches
from adapterbank.codec.rows import pack_rows
from adapterbank.errors import AdapterBankError
from adapterbank.subspace.completion import leading_directions
from adapterbank.tuner.finding import as_bank
from adapterbank.tuner.layer import EigenLoraLayer
from adapterbank.tuner.live import adapter_config, adapter_layers, module_names
from adapterbank.tuner.starts import core_of

OVERSAMPLING = 8


def augment(
    model: nn.Module,
    batches: Iterable[Any],
    count: int = 16,
    *,
    adapter_name: str = "default",
    loss: Loss = default_loss,
    bits: int = 4,
    head_steps: int = 20,
    head_lr: float = 1e-2,
    most_batches: int = 8,
) -> None:
    """Add the leading directions of the task's gradient to an untrained adapter's basis.

    The head is fitted for a few steps first, since a zero one has no gradient, and put back at the end. In between two
    passes over the batches find the leading singular vectors of each layer's weight gradient, outside the basis
    (randomised SVD, arXiv:0909.4061). They're stored with the adapter at a few bits; as a member of a bank they cost
    nothing.

    Args:
        model: A PEFT model with an adapter that is not trained yet.
        batches: Of a dataloader: mappings that the model takes, or whatever ``loss`` takes.
        count: Directions a side to add.
        adapter_name: Which adapter.
        loss: Loss of a batch.
        bits: Of a stored value, 4 or 8.
        head_steps: Steps of AdamW on the modules in ``modules_to_save``, for the while of this call.
        head_lr: Their learning rate.
        most_batches: No more are read.

    Raises:
        AdapterBankError: If the adapter can't take directions, or there are no batches.
    """
    layers, config = _ready(model, adapter_name), adapter_config(model, adapter_name)
    own = any("eig_V" in layer.weights(adapter_name) for layer in layers.values())
    if config.train != "coefficients" or own or config.use_mean:
        raise AdapterBankError("gradient directions go with train='coefficients', no means and no own components")
    held = held_batches(batches, most_batches)
    _check_room(layers, adapter_name, count)
    width = count + OVERSAMPLING
    seeded = torch.Generator().manual_seed(config.seed)
    tests = {n: torch.randn(x.in_features, width, generator=seeded) for n, x in layers.items()}
    with fitted_head(model, adapter_name, held, loss, head_steps, head_lr):
        # first pass: the range of each gradient; second: the gradient on it
        images = _accumulate(model, layers, held, loss, lambda name, g, x: g.T @ (x @ tests[name].to(x)))
        ranges = {name: torch.linalg.qr(image)[0] for name, image in images.items()}
        parts = _accumulate(model, layers, held, loss, lambda name, g, x: (g @ ranges[name].to(g)).T @ x)
    for name, layer in layers.items():
        V, U = layer.basis(adapter_name)
        seen = parts[name]  # (width, d_in): the gradient is ranges @ seen
        into = leading_directions(seen, count, V)
        out = leading_directions(seen.T @ ranges[name].T, count, U.T)
        _extend(layer, adapter_name, _filled(into, count), _filled(out, count), bits)
    config.gradient_directions = count
    config.gradient_bits = bits


def nearest(
    model: nn.Module,
    batches: Iterable[Any],
    bank: Bank | str | PathLike[str],
    *,
    adapter_name: str = "default",
    loss: Loss = default_loss,
    head_steps: int = 20,
    head_lr: float = 1e-2,
    most_batches: int = 8,
) -> dict[str, float]:
    """Members of a bank by how fast a step towards each lowers the task's loss, fastest first.

    To first order: ``-<gradient, dW> / ||dW||`` inside the shared subspace. Give the best to :func:`start_at`.

    Args:
        model: A PEFT model with an adapter that starts as the base model.
        batches: As in :func:`augment`.
        bank: The adapter's bank.
        adapter_name: Which adapter.
        loss: As in :func:`augment`.
        head_steps: As in :func:`augment`.
        head_lr: As in :func:`augment`.
        most_batches: No more are read.

    Raises:
        AdapterBankError: If the adapter is not the active one, or there are no batches.
    """
    layers, held, bank = _ready(model, adapter_name), held_batches(batches, most_batches), as_bank(bank)
    names = module_names(model, adapter_name, bank)
    bases = {name: layer.basis(adapter_name) for name, layer in layers.items()}

    def core(name: str, g: Tensor, x: Tensor) -> Tensor:
        V, U = bases[name]
        return (g @ U.to(g)).T @ (x @ V.T.to(x))

    with fitted_head(model, adapter_name, held, loss, head_steps, head_lr):
        gradients = _accumulate(model, layers, held, loss, core)
    scores = {}
    for member in bank.names:
        adapter = bank.reconstruct(member)
        gain = energy = 0.0
        for name, gradient in gradients.items():
            if names[name] in adapter.modules:
                factors: LoraFactors = adapter.factors(names[name])
                update = core_of(*bases[name], [(1.0, factors)])
                gain -= float((gradient * update).sum())
                energy += float(update.square().sum())
        scores[member] = gain / energy**0.5 if energy else 0.0
    return dict(sorted(scores.items(), key=lambda item: -item[1]))


def _ready(model: nn.Module, adapter_name: str) -> dict[str, EigenLoraLayer]:
    """Layers of an adapter that is active alone: the gradient would be another adapter's otherwise."""
    layers = adapter_layers(model, adapter_name)
    for layer in layers.values():
        if layer.active_adapters != [adapter_name] or layer.merged or layer.disable_adapters:
            raise AdapterBankError(
                f"{adapter_name!r} is not the one active adapter; call set_adapter({adapter_name!r})"
            )
        if layer.basis_of[adapter_name].fold > 1:
            raise AdapterBankError("a flat basis has no directions of rows; fit the bank by product")
    return layers


def _check_room(layers: Mapping[str, EigenLoraLayer], adapter_name: str, count: int) -> None:
    room = 0
    for layer in layers.values():
        k_in, k_out = layer.basis_of[adapter_name].k
        room = max(room, layer.in_features - k_in, layer.out_features - k_out)
    # narrower layers take what they have room for, and zeros beyond
    if not 1 <= count <= room:
        raise AdapterBankError(f"count={count}: no layer has room for more than {room} directions beside its basis")


def _accumulate(
    model: nn.Module,
    layers: Mapping[str, EigenLoraLayer],
    batches: list[Any],
    loss: Loss,
    product: Callable[[str, Float[Tensor, "t d_out"], Float[Tensor, "t d_in"]], Tensor],
) -> dict[str, Tensor]:
    """Sums over the batches of ``product(layer, gradient of the output, input)``; the model stays as it was."""
    sums: dict[str, Tensor] = {}
    asked = [p for layer in layers.values() for p in layer.parameters() if p.requires_grad]
    if not asked:
        raise AdapterBankError("the adapter has nothing to train: call set_adapter, without inference_mode")

    def watch(name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            x = args[0].detach().flatten(0, -2).float()

            def add(gradient: Tensor) -> None:
                found = product(name, gradient.detach().flatten(0, -2).float(), x).cpu()
                sums[name] = sums[name] + found if name in sums else found

            output.register_hook(add)  # type: ignore[no-untyped-call]  # torch's has no types

        return hook

    with evaluating(model):
        handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
        try:
            for batch in batches:
                # not backward(): nobody's .grad changes
                torch.autograd.grad(loss(model, batch), asked, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
    return sums


def _filled(rows: Float[Tensor, "p d"], count: int) -> Float[Tensor, "count d"]:
    # a gradient of lower rank has no more directions: zeros take no coefficient anywhere
    return torch.nn.functional.pad(rows, (0, 0, 0, count - len(rows)))


@torch.no_grad()
def _extend(layer: EigenLoraLayer, name: str, into: Tensor, out: Tensor, bits: int) -> None:
    weights, count = layer.weights(name), len(into)
    there = weights.get("eig_gradient_in")
    if there is not None and (there.any() or len(there) != count):
        raise AdapterBankError("the adapter has gradient directions already; augment a fresh one")
    coef_A, coef_B = weights["eig_coef_A"], weights["eig_coef_B"]
    if coef_B.any():  # it has a start: the update stays as it is
        fresh = torch.nn.functional.pad(coef_A, (0, count))
    else:  # one draw for all columns, so that rows keep the length of a fresh LoRA's
        fresh = torch.randn(coef_A.shape[0], coef_A.shape[1] + count).to(coef_A)
        fresh = fresh / (3 * fresh.shape[1]) ** 0.5
    layer.bits[name] = bits
    if there is None:  # otherwise its config has made room
        layer.set_weight("eig_coef_A", name, fresh)
        layer.set_weight("eig_coef_B", name, torch.cat([coef_B, coef_B.new_zeros(count, coef_B.shape[1])]))
    layer.set_weight("eig_gradient_in", name, pack_rows(into, bits))
    layer.set_weight("eig_gradient_out", name, pack_rows(out, bits))
