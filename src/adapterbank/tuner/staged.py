"""Components as well: coefficients first, then a few steps on own copies of the basis (paper, appendix A.2.1)."""

from typing import Any

from torch import nn
from transformers import TrainerCallback

from adapterbank.errors import AdapterBankError
from adapterbank.tuner.live import adapter_config, adapter_layers
from adapterbank.tuner.optimizer import COMPONENT_LR


def train_components(model: nn.Module, adapter_name: str = "default") -> list[nn.Parameter]:
    """Give an adapter own copies of its components and train them from now on; the bank's stay as they are.

    Args:
        model: A model with the adapter.
        adapter_name: Which adapter.

    Returns:
        The new parameters, for the optimiser.

    Raises:
        AdapterBankError: If the adapter trains something else than coefficients on the basis.
    """
    config = adapter_config(model, adapter_name)
    if config.gradient_directions or config.train not in ("coefficients", "components"):
        raise AdapterBankError("components are trained beside coefficients on the basis alone: train='coefficients'")
    found = []
    for layer in adapter_layers(model, adapter_name).values():
        layer.own_components(adapter_name)
        weights = layer.weights(adapter_name)
        found += [weights["eig_V"], weights["eig_U"]]
    config.train = "components"
    return found


class StagedComponents(TrainerCallback):
    """Trains coefficients, and in the last share of the steps the components too.

    Args:
        share: Of all steps, at the end, in which components are trained.
        lr: Of the components, constant: few steps are left.
        adapter_name: Which adapter.

    Raises:
        AdapterBankError: If ``share`` is outside (0, 1).
    """

    def __init__(self, share: float = 0.2, *, lr: float = COMPONENT_LR, adapter_name: str = "default") -> None:
        if not 0 < share < 1:
            raise AdapterBankError(f"share={share} is outside (0, 1)")
        self.share, self.lr, self.adapter_name = share, lr, adapter_name
        self.begun = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse what would go wrong at the end.

        Raises:
            AdapterBankError: With ``load_best_model_at_end``.
        """
        if args.load_best_model_at_end:
            raise AdapterBankError(
                "StagedComponents and load_best_model_at_end don't go together: a best model from before the switch "
                "has no components, and those trained since would stay beside its coefficients"
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Switch when the last share of the steps begins.

        Raises:
            AdapterBankError: In several processes, which wouldn't sum the new gradients.
        """
        if self.begun or state.global_step < (1 - self.share) * state.max_steps:
            return
        if args.world_size > 1:
            raise AdapterBankError("StagedComponents works in one process: others wouldn't learn of the new parameters")
        self.begun = True
        group = {"params": train_components(kwargs["model"], self.adapter_name), "lr": self.lr}
        optimizer, scheduler = kwargs["optimizer"], kwargs["lr_scheduler"]
        optimizer.add_param_group(group)
        inner = getattr(scheduler, "scheduler", scheduler)  # accelerate wraps it
        for name, value in (("base_lrs", self.lr), ("min_lrs", 0.0), ("lr_lambdas", lambda step: 1.0)):
            if hasattr(inner, name):  # one list per group, by the kind of schedule
                getattr(inner, name).append(value)
