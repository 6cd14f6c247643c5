"""Names: of adapters in a bank, of base models, and of modules in a live model."""

import re
from collections.abc import Iterable
from pathlib import Path

from adapterbank.errors import AdapterError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def check_name(name: str) -> str:
    """Return ``name`` if it can name an adapter: it becomes a file name, a key and part of a URL.

    Raises:
        AdapterError: If it can't; the message says how to give another one.
    """
    # fullmatch, because `$` would let a trailing newline through
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise AdapterError(
            f"{name!r} can't name an adapter: use 1 to 128 of A-Z a-z 0-9 . _ - and begin with a letter or digit; "
            "give one as NAME=PATH or name=..."
        )
    return name


def split_name(source: str) -> tuple[str | None, str]:
    """``NAME=PATH`` as name and path; no name where there is none, or where a file is called so.

    Args:
        source: As a user wrote it.
    """
    if "=" in source and not Path(source).exists():
        name, path = source.split("=", 1)
        return name, path
    return None, source


def base_model_id(value: str | None) -> str | None:
    """A base model's id without any local path: hub ids stay, a path becomes its last part.

    A directory of the hub's cache (``.../models--org--name/snapshots/<hash>``) becomes ``org/name``.
    """
    if not value:
        return None
    parts = [part for part in re.split(r"[/\\]", value) if part]
    pathlike = value[0] in "/~.\\" or "\\" in value or re.match(r"[A-Za-z]:", value) or len(parts) > 2
    if not pathlike and not _is_dir(value):
        return value
    for part in parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/", 1)
    # "~", "." and ".." name nobody's model but somebody's folder
    return parts[-1] if parts and parts[-1].strip("~.") else None


def _is_dir(value: str) -> bool:
    try:
        return Path(value).is_dir()
    except (OSError, ValueError):  # a NUL byte or a name that is too long
        return False


def match_modules(wanted: Iterable[str], present: Iterable[str]) -> dict[str, str]:
    """Find each wanted module among those present in a model: the same name, or the unique longest common suffix.

    An adapter of ``bert.encoder.layer.0...`` so fits a model that calls it ``encoder.layer.0...``, and the reverse.
    Only leading parts may differ: the shorter of the two names must be a suffix of the longer one.

    Args:
        wanted: Module names of an adapter or a bank.
        present: Module names of the live model.

    Returns:
        The model's name for each wanted name that has one.

    Raises:
        AdapterError: If two modules of the model fit one wanted name equally well.
    """
    names = set(present)
    by_suffix: dict[str, list[str]] = {}
    for name in names:
        for suffix in _suffixes(name):
            by_suffix.setdefault(suffix, []).append(name)
    found: dict[str, str] = {}
    for module in wanted:
        if module in names:
            found[module] = module
            continue
        # the model's names are longer (they end in the whole wanted name), or shorter (the wanted one ends in them)
        candidates = by_suffix.get(module) or [s for s in _suffixes(module) if s in names][:1]
        if len(candidates) > 1:
            raise AdapterError(
                f"{module} fits {len(candidates)} modules of the model: {', '.join(sorted(candidates)[:3])}; "
                "pass the submodule that the adapter belongs to"
            )
        if candidates:
            found[module] = candidates[0]
    return found


def match_layers(modules: Iterable[str], layers: Iterable[str]) -> dict[str, str]:
    """Find the module of a bank for each layer of a model that has one: :func:`match_modules`, seen from the model.

    Args:
        modules: Module names of the bank.
        layers: Layer names of the model.

    Raises:
        AdapterError: If two modules fit one layer and neither has its name, or two layers one module.
    """
    fitting: dict[str, list[str]] = {}
    for module, layer in match_modules(modules, layers).items():
        fitting.setdefault(layer, []).append(module)
    found = {}
    for layer, names in fitting.items():
        if len(names) > 1 and layer not in names:
            raise AdapterError(f"{layer} fits two modules of the bank, {names[0]} and {names[1]}")
        found[layer] = layer if layer in names else names[0]
    return found


def _suffixes(name: str) -> list[str]:
    """Every dotted suffix shorter than the name that still has two parts, longest first."""
    parts = name.split(".")
    # one part alone ("query") would fit by accident
    return [".".join(parts[i:]) for i in range(1, len(parts) - 1)]
