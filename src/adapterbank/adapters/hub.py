"""Adapters from the Hugging Face hub: two files, nothing else."""

from pathlib import Path

from adapterbank.adapters.peft_config import CONFIG_FILE
from adapterbank.errors import AdapterError, MissingFileError


def fetch(repo: str, revision: str | None, weights_files: tuple[str, ...]) -> tuple[Path, Path]:
    """Download an adapter's config and weights into the hub's own cache.

    Args:
        repo: ``org/name``.
        revision: Branch, tag or commit.
        weights_files: Names of acceptable weights, best first.

    Returns:
        The directory with the config, and the weights file.

    Raises:
        AdapterError: If ``huggingface_hub`` is not installed.
        MissingFileError: If the hub can't be reached, or has no such adapter.
    """
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise AdapterError(
            f"{repo!r} is no path here, and reading from the hub needs huggingface_hub: pip install 'adapterbank[hub]'"
        ) from error
    try:
        config = Path(hf_hub_download(repo, CONFIG_FILE, revision=revision))
        for file in weights_files:
            try:
                return config.parent, Path(hf_hub_download(repo, file, revision=revision))
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                continue
    # offline without a cached copy, a refused connection, an unknown repository, a file it lacks
    except (OSError, HfHubHTTPError, ValueError) as error:
        raise MissingFileError(
            f"{repo!r} is no path here, and could not be read from the hub: {str(error).strip().splitlines()[0][:200]}"
        ) from error
    raise MissingFileError(f"{repo!r} on the hub holds no {weights_files[0]}; ask its author for a safetensors file")
