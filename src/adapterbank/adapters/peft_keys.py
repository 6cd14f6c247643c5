"""PEFT's tensor names: which tensors form a module's factors, which are kept beside them, which are refused."""

from collections.abc import Mapping
from dataclasses import dataclass

from adapterbank.adapters.factors import ModuleShape
from adapterbank.adapters.tensors import TensorEntry
from adapterbank.errors import AdapterError

PREFIX = "base_model.model."
"""What PEFT puts before a module's own name in every file."""

WRAPPED = {"base_layer", "original_module", "modules_to_save"}
"""Names that PEFT puts between a live module's name and its parts."""

REFUSED = {
    "lora_magnitude_vector": "it is a DoRA: its update depends on the base weight and is in general of full rank; "
    "train without use_dora, or merge it into the base and take a truncated SVD of the difference",
    "lora_embedding_A": "it adapts an embedding, which is not supported; train without the embedding in target_modules",
    "lora_embedding_B": "it adapts an embedding, which is not supported; train without the embedding in target_modules",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleKeys:
    """Names of one module's stored tensors; ``E`` are AdaLoRA's singular values, which are folded into A."""

    A: str
    B: str
    E: str | None = None

    def shape(self, entries: Mapping[str, TensorEntry], rank: int, where: str) -> ModuleShape:
        """Check the stored shapes against each other and against the config's rank.

        Raises:
            AdapterError: With the shapes found and those expected.
        """
        A, B = entries[self.A].shape, entries[self.B].shape
        if len(A) > 2 or len(B) > 2:
            raise AdapterError(
                f"{where}: A is {A} and B is {B}, expected two dimensions: convolutions and stacked experts are not "
                "supported; train with linear modules as target_modules"
            )
        if len(A) != 2 or len(B) != 2 or A[1] == 0 or B[0] == 0:
            raise AdapterError(
                f"{where}: A is {A} and B is {B}, expected (r, d_in) and (d_out, r); "
                "were the shards gathered before the adapter was saved?"
            )
        if A[0] != rank and A[1] == rank and B[0] == rank:
            raise AdapterError(
                f"{where}: A is {A} and B is {B}, expected A ({rank}, d_in) and B (d_out, {rank}): they are "
                "transposed; store the transposes of both"
            )
        if A[0] != rank:
            raise AdapterError(
                f"{where}: A has {A[0]} rows, expected {rank} by the config's r and rank_pattern, so the scale would "
                "be wrong; use the config that belongs to these weights"
            )
        if B[1] != A[0]:
            raise AdapterError(f"{where}: A has {A[0]} rows and B has {B[1]} columns, expected the same; save it again")
        if self.E is not None and entries[self.E].shape != (A[0], 1):
            raise AdapterError(f"{where}: lora_E is {entries[self.E].shape}, expected {(A[0], 1)}; save it again")
        for key in (self.A, self.B, self.E or self.A):
            if not entries[key].dtype.is_floating_point:
                raise AdapterError(f"{where}: {key} holds {entries[key].dtype}, expected floats; save it unquantised")
        return ModuleShape(rank=max(A[0], 1), d_in=A[1], d_out=B[0])


def sort_keys(
    entries: Mapping[str, TensorEntry], where: str, *, adalora: bool = False
) -> tuple[dict[str, ModuleKeys], dict[str, str]]:
    """Sort stored names into the factors of each module and everything else.

    Args:
        entries: The stored tensors.
        where: How errors call the adapter.
        adalora: Whether each module has singular values, too.

    Returns:
        The names of each module's factors, and the stored name of each extra by its name without PEFT's prefix.

    Raises:
        AdapterError: If a name is of no known layout, or half of a pair is missing.
    """
    pairs: dict[str, dict[str, str]] = {}
    extras: dict[str, str] = {}
    adapters: set[str] = set()
    for key in sorted(entries):
        name = key.removeprefix(PREFIX)
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.startswith("lora_")), None)
        if at is None:
            # but bias="all" and bias="lora_only" save wrapped biases under such names, which are kept as they are
            if not name.endswith(".bias") and WRAPPED.intersection(parts):
                raise AdapterError(
                    f"{where}: {key} belongs to a whole live model; give peft.get_peft_model_state_dict(model), or use "
                    "LoraAdapter.from_peft(model)"
                )
            _add(extras, name, key, where)
            continue
        module, letter, rest = ".".join(parts[:at]), parts[at], parts[at + 1 :]
        if letter in REFUSED:
            raise AdapterError(f"{where}, {module}: {REFUSED[letter]}")
        # with the adapter's own name inside ("lora_A.default.weight") when it comes from a live model's state dict
        if rest and rest[0] not in ("weight", "bias"):
            adapters.add(rest.pop(0))
        kind = rest[0] if rest else "weight"
        if not module or len(rest) > 1 or (letter, kind) not in (_KNOWN | _ADALORA if adalora else _KNOWN):
            raise AdapterError(
                f"{where}: {key} has an unknown layout, expected {PREFIX}<module>.lora_A.weight; "
                "convert the file to PEFT's layout first"
            )
        if kind == "bias":
            _add(extras, f"{module}.lora_B.bias", key, where)
        else:
            _add(pairs.setdefault(module, {}), letter[-1], key, where)
    if len(adapters) > 1:
        raise AdapterError(f"{where}: it mixes {len(adapters)} adapters ({', '.join(sorted(adapters)[:3])}); give one")
    if not pairs:
        raise AdapterError(
            f"{where}: it holds no LoRA weights, only {_first(entries)}; expected {PREFIX}<module>.lora_A.weight"
        )
    for module, pair in pairs.items():
        for letter in "ABE" if adalora else "AB":
            if letter not in pair:
                raise AdapterError(f"{where}, {module}: lora_{letter} is missing; save the adapter again")
    return {module: ModuleKeys(**pair) for module, pair in pairs.items()}, extras


_KNOWN = {("lora_A", "weight"), ("lora_B", "weight"), ("lora_B", "bias")}
_ADALORA = {("lora_E", "weight")}


def _add(found: dict[str, str], name: str, key: str, where: str) -> None:
    if name in found:
        raise AdapterError(f"{where}: {found[name]} and {key} are the same tensor; keep one of them")
    found[name] = key


def _first(entries: Mapping[str, TensorEntry]) -> str:
    names = sorted(entries)
    return f"{names[0]!r} and {len(names) - 1} others" if names else "nothing"
