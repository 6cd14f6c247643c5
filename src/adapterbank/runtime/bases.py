"""Where a model has the layers of a bank, and the directions that all members share there."""

from torch import nn

from adapterbank.adapters.live import layer_sizes
from adapterbank.adapters.names import match_modules
from adapterbank.bank import Bank
from adapterbank.errors import BankError
from adapterbank.runtime.members import LayerBasis, directions


def bases_of(bank: Bank | None, model: nn.Module, k: int | None) -> tuple[dict[str, LayerBasis], str]:
    """By layer of the model, and what names them; nothing without a bank.

    Raises:
        BankError: If the model lacks a layer, or the bank can't give ``k``.
    """
    if bank is None:
        return {}, ""
    layers, basis = _layers_of(bank, model), bank.basis(directions(bank) if k is None else k)
    found = {layer: LayerBasis.of(basis.modules[module]) for module, layer in layers.items()}
    # two machines may derive directions differently, and one in another version of its libraries
    return found, f"{basis.fingerprint} {basis.probe:.2f}"


def _layers_of(bank: Bank, model: nn.Module) -> dict[str, str]:
    """The model's layer of each module of the bank.

    Raises:
        BankError: If there is none, or it has another size, or is another module's too.
    """
    # quantised layers may keep their weight under other names
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if hasattr(layer, "weight") or hasattr(layer, "in_features")
    }
    found = match_modules([module.name for module in bank.index.modules], layers)
    is_it = f"is it the bank's base, {bank.index.base or 'unnamed'}?"
    for module in bank.index.modules:
        if module.name not in found:
            raise BankError(f"the model has no layer {module.name}; {is_it}")
        sizes = layer_sizes(layers[found[module.name]]) or (module.d_in, module.d_out)
        if sizes != (module.d_in, module.d_out):
            raise BankError(
                f"{module.name}: the model's layer is {sizes[1]} x {sizes[0]}, the bank's {module.d_out} x "
                f"{module.d_in}; {is_it}"
            )
    if len(set(found.values())) < len(found):
        raise BankError(
            "several modules of the bank fit one layer of the model; give the whole model, not a part of it"
        )
    return found
