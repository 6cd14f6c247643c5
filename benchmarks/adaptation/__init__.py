"""Does recycling adapters help a new task? Every method at its own learning rate, on real models and data."""
