"""Adapters' directories that went wrong."""

import json

from safetensors.torch import load_file, save_file


def spoil(directory, change=lambda tensors: None, **fields):
    """Change the tensors or the config of a PEFT directory."""
    tensors = load_file(directory / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = json.loads((directory / "adapter_config.json").read_text()) | fields
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory
