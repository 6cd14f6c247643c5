"""Training from a file of examples: the same loop for tasks in a bank and for sparse adapters."""
