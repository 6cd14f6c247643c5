"""SHiRA (arXiv:2406.13175): an adapter as one or two per cent of the base weights, changed in place."""
