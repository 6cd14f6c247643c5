"""Recycle LoRA adapters into a bank: one shared basis per layer, a few coefficients per adapter."""
