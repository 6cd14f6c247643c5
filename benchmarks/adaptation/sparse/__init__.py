"""SHiRA on real tasks: masks at equal counts, adapters at another strength, several of them in one model."""
