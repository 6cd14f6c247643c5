"""Strength of adapters in a PEFT layer, as diffusers and PEFT's helpers ask for it."""


class ScaledAdapters:
    """What a layer's class takes on that has a scale for each of its adapters."""

    scaling: dict[str, float]
    initial_scaling: dict[str, float]
    """What each was trained with."""
    active_adapters: list[str]

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply an adapter's own scale by ``scale``."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.initial_scaling[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of all active adapters."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of all active adapters, or set it back."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = self.initial_scaling[name] if scale is None else self.scaling[name] / scale
