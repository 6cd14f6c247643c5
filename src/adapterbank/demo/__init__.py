"""A real model, real data and real LoRA adapters from package registries: what the demo and the benchmarks run on."""
