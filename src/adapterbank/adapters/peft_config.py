"""PEFT's ``adapter_config.json``: what is read from it, what is refused and why, and what is written back."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapterbank.adapters.factors import ModuleShape
from adapterbank.adapters.names import base_model_id
from adapterbank.errors import AdapterError, MissingFileError

CONFIG_FILE = "adapter_config.json"
MAX_CONFIG = 10_000_000
TASK_TYPE = "EIGENLORAX"
"""``peft_type`` of tasks that were trained in a bank."""

KEPT: dict[str, type | tuple[type, ...]] = {
    "task_type": str,
    "auto_mapping": dict,
    "base_model_name_or_path": str,
    "revision": str,
    "r": int,
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "target_modules": (list, str),
    "exclude_modules": (list, str),
    "modules_to_save": list,
    "layers_to_transform": (list, int),
    "layers_pattern": (list, str),
    "fan_in_fan_out": bool,
    "bias": str,
    "lora_bias": bool,
    "use_rslora": bool,
    "rank_pattern": dict,
    "alpha_pattern": dict,
    "ensure_weight_tying": bool,
    # AdaLoRA's only
    "init_r": int,
}
"""Fields that outlive training, with the types PEFT gives them; all others are dropped."""

REFUSED = {
    "use_dora": "it is a DoRA: its update depends on the norms of the base weight and is in general of full rank, and "
    "PEFT's convert_to_lora gets it wrong; train without use_dora, or merge it into the base (merge_and_unload) and "
    "take a truncated SVD of the difference to the base",
    "alora_invocation_tokens": "it is an activated LoRA (aLoRA), which acts on part of the tokens only; "
    "train without alora_invocation_tokens",
    "layer_replication": "its layer_replication changes the base model's layers; train on the unchanged base",
    "target_parameters": "its target_parameters adapt bare parameters (experts of a mixture), not linear modules; "
    "train with target_modules",
    "trainable_token_indices": "its trainable_token_indices change rows of the embedding; train without them, or "
    "with the embedding in modules_to_save",
    "use_qalora": "it is a QALoRA, whose A takes pooled inputs; train without use_qalora",
    "use_bdlora": "it is a BD-LoRA, whose factors are block-diagonal; train without use_bdlora",
    "kasa_config": "it is a KaSA adapter, which cuts singular values off the base; train without kasa_config",
    "monteclora_config": "it is a MonteCLoRA, whose factors are sampled; train without monteclora_config",
    "arrow_config": "it is an Arrow router over other adapters; give those adapters themselves",
}
"""Variants whose update is not ``scale * B @ A`` on one linear module, with the reason and the way out."""

PLAIN_INITS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")


def read_config(path: Path, where: str) -> dict[str, Any]:
    """Parse an ``adapter_config.json``.

    Args:
        path: The file.
        where: How errors call the adapter.

    Raises:
        MissingFileError: If there is no such file.
        AdapterError: If it is no JSON object.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CONFIG + 1)
    except FileNotFoundError as error:
        raise MissingFileError(
            f"{where}: {path} does not exist; copy the adapter's {CONFIG_FILE} beside its weights or pass config="
        ) from error
    except OSError as error:
        raise AdapterError(f"{where}: {path} can't be read: {error.strerror or error}") from error
    if len(text) > MAX_CONFIG:
        raise AdapterError(f"{where}: {path} is larger than {MAX_CONFIG} bytes, which is no LoRA's config")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(
            f"{where}: {path} is broken JSON ({error}); copy it again from where it was trained"
        ) from error
    if not isinstance(config, dict):
        raise AdapterError(f"{where}: {path} holds a {type(config).__name__}, expected a JSON object")
    return config


def refuse_variants(config: Mapping[str, Any], where: str) -> None:
    """Refuse what is not a plain LoRA by its config.

    Raises:
        AdapterError: Naming the variant, the reason and the way out.
    """
    kind = peft_type(config)
    if kind == TASK_TYPE:
        raise AdapterError(
            f"{where}: it was trained in a bank, so it is coefficients on that bank's basis; add it to the bank "
            "(Bank.add), or take the LoRA that adapterbank.tuner.export_lora makes of it"
        )
    if kind not in ("LORA", "ADALORA"):
        raise AdapterError(
            f"{where}: its peft_type is {kind[:40]!r}, expected 'LORA' or 'ADALORA'; "
            "convert it with peft.convert_to_lora where PEFT supports that for its type, or train a LoRA"
        )
    for field, reason in REFUSED.items():
        if config.get(field):
            raise AdapterError(f"{where}: {reason}")
    init = str(config.get("init_lora_weights", True)).lower()
    if init == "loftq":
        raise AdapterError(
            f"{where}: init_lora_weights='loftq' replaced the base weights, so its factors fit no other base; "
            "train on the quantised base without LoftQ"
        )
    if init not in PLAIN_INITS:
        raise AdapterError(
            f"{where}: init_lora_weights={init[:40]!r} changed the base weights, so its factors are no update of the "
            "original base; in PEFT save it with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=PATH_OF_THE_INITIAL_ADAPTER)"
        )


def clean_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Keep the fields that matter for a trained adapter, check their types, and take out local paths.

    Raises:
        AdapterError: If a field has a type that PEFT never gives it, or ``r`` or ``lora_alpha`` is missing.
    """
    kept: dict[str, Any] = {"peft_type": peft_type(config)}
    for field, types in KEPT.items():
        value = config.get(field)
        if value is None:
            continue
        if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
            raise AdapterError(f"{where}: {CONFIG_FILE} has {field}={str(value)[:40]!r}; PEFT never writes that")
        if isinstance(value, str) and not value.isprintable():
            raise AdapterError(f"{where}: {CONFIG_FILE} has {field}={value[:40]!a}, expected printable characters")
        kept[field] = value
    for field in ("init_r" if kept["peft_type"] == "ADALORA" else "r", "lora_alpha"):
        if field not in kept:
            raise AdapterError(f"{where}: {CONFIG_FILE} has no {field}, so the scale of the update is unknown; add it")
    for field, value in kept.items():
        # whatever is hidden in a list would fail inside PEFT, far from here
        kinds = int if field == "layers_to_transform" else str
        if isinstance(value, list) and not all(isinstance(item, kinds) and str(item).isprintable() for item in value):
            raise AdapterError(f"{where}: {CONFIG_FILE} has {field}={str(value)[:40]!a}; PEFT never writes that")
    mapping = kept.pop("auto_mapping", {})
    names = [mapping.get(field) for field in ("base_model_class", "parent_library")]
    if all(isinstance(name, str) and re.fullmatch(r"[\w.]+", name) for name in names):
        kept["auto_mapping"] = dict(zip(("base_model_class", "parent_library"), names, strict=True))
    base = base_model_id(kept.pop("base_model_name_or_path", None))
    if base is not None:
        kept["base_model_name_or_path"] = base
    return kept


def peft_type(config: Mapping[str, Any]) -> str:
    """The method that a config is of; LoRA where it doesn't say."""
    # an enum's member when the config comes from a live model
    kind = config.get("peft_type") or "LORA"
    return str(getattr(kind, "value", kind))


class Scaling:
    """The rank that the config demands of each module, and the scale of its update.

    Args:
        config: A cleaned config.
        where: How errors call the adapter.

    Raises:
        AdapterError: If a number or a pattern is unusable.
    """

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.is_adalora = config["peft_type"] == "ADALORA"
        self.default_rank = int(config["init_r" if self.is_adalora else "r"])
        self.default_alpha = _finite(config["lora_alpha"], "lora_alpha", where)
        self._rslora = bool(config.get("use_rslora"))
        if self.default_rank < 1:
            raise AdapterError(f"{where}: {CONFIG_FILE} has rank {self.default_rank}, expected at least 1")
        self._ranks: list[tuple[re.Pattern[str], float]] = []
        self._alphas: list[tuple[re.Pattern[str], float]] = []
        self._masks: Mapping[str, Any] = {}
        if self.is_adalora:
            # masks by parameter name, no regexes; and AdaLoRA knows neither alpha_pattern nor rsLoRA
            self._masks = config.get("rank_pattern") or {}
            return
        self._ranks = _patterns(config, "rank_pattern", where)
        self._alphas = _patterns(config, "alpha_pattern", where)
        for pattern, rank in self._ranks:
            if rank < 1 or rank % 1:
                raise AdapterError(
                    f"{where}: rank_pattern gives {pattern.pattern!r} rank {rank}, expected a whole number"
                )

    def rank(self, module: str) -> int:
        """The rank of ``module`` by the config."""
        if self.is_adalora:
            mask = self._masks.get(f"{module}.lora_E")
            return sum(map(bool, mask)) if isinstance(mask, list) else self.default_rank
        return int(_first_match(self._ranks, module, float(self.default_rank)))

    def scale(self, module: str) -> float:
        """The scale of the update of ``module``."""
        if self.is_adalora:
            # SVDLinear divides by the rank before the cut, with an epsilon, and reads alpha <= 0 as "alpha = rank"
            alpha = self.default_alpha if self.default_alpha > 0 else float(self.default_rank)
            return alpha / (self.default_rank + 1e-5)
        alpha, rank = _first_match(self._alphas, module, self.default_alpha), self.rank(module)
        return alpha / math.sqrt(rank) if self._rslora else alpha / rank


def _first_match(patterns: list[tuple[re.Pattern[str], float]], module: str, default: float) -> float:
    """PEFT's rule (``get_pattern_key``): the first key that is a regex for a dotted suffix of the name."""
    return next((value for pattern, value in patterns if pattern.match(module)), default)


def _patterns(config: Mapping[str, Any], field: str, where: str) -> list[tuple[re.Pattern[str], float]]:
    patterns = []
    for key, value in (config.get(field) or {}).items():
        # Python's regexes backtrack: a repeated group, or many repeats in a row, can take years on one name
        if re.search(r"\)[*+{]", key) or len(re.findall(r"[*+{]", key)) > 4 or len(key) > 1000:
            raise AdapterError(
                f"{where}: {field} has the key {key[:60]!r}, too complex to match safely; write names out"
            )
        try:
            pattern = re.compile(rf"(.*\.)?({key})$")
        except (re.error, RecursionError, OverflowError) as error:
            raise AdapterError(f"{where}: {field} has the key {key[:60]!r}, no regular expression ({error})") from error
        if value is not None:  # null means: as everywhere else
            patterns.append((pattern, _finite(value, f"{field}[{key!r}]", where)))
    return patterns


def _finite(value: Any, field: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
        raise AdapterError(f"{where}: {CONFIG_FILE} has {field}={str(value)[:40]!r}, expected a finite number")
    return float(value)


def written_config(
    config: Mapping[str, Any], base: str | None, modules: Mapping[str, ModuleShape], scales: Mapping[str, float]
) -> dict[str, Any]:
    """The ``adapter_config.json`` of a plain LoRA with these ranks and scales, and all else as in ``config``.

    Args:
        config: A cleaned config.
        base: Id of the base model.
        modules: Shapes of the modules.
        scales: Scale of each module's update.

    Returns:
        Only fields that every PEFT since rank patterns and vLLM know.
    """
    ranks = {name: shape.rank for name, shape in modules.items()}
    # the commonest pair becomes r and lora_alpha, so that an ordinary adapter gets no pattern at all
    (rank, scale), _ = Counter((ranks[name], scales[name]) for name in modules).most_common(1)[0]
    alpha = _alpha(scale, rank)
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, int | float] = {}
    for name in modules:
        # anchored and escaped: PEFT reads keys as regexes for any dotted suffix, and a suffix can be a name of its own
        key = "^" + re.escape(name)
        if ranks[name] != rank:
            rank_pattern[key] = ranks[name]
        if _alpha(scales[name], ranks[name]) != alpha:
            alpha_pattern[key] = _alpha(scales[name], ranks[name])
    written = {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": None,
        "revision": None,
        "lora_dropout": 0.0,
        "target_modules": sorted(modules),
        "exclude_modules": None,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "fan_in_fan_out": False,
        "bias": "none",
        "lora_bias": False,
    }
    written |= {field: value for field, value in config.items() if field in written and field != "peft_type"}
    if config.get("ensure_weight_tying"):  # newer than the rest, so only where it is used
        written["ensure_weight_tying"] = True
    return written | {
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _alpha(scale: float, rank: int) -> int | float:
    """``scale * rank``, as the whole number that it was before it was divided, where it was one."""
    alpha = scale * rank
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha
