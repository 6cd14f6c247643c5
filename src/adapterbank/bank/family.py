"""The adapters of one fit: opened, compared, measured, and read one module at a time as often as the fit needs them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from adapterbank.adapters import LoraAdapter, base_model_id, check_name
from adapterbank.adapters.names import split_name
from adapterbank.bank.index import ModuleEntry
from adapterbank.errors import AdapterBankError, AdapterError, BankError
from adapterbank.subspace.updates import ThinUpdate, thin_svd, update_norm

Progress = Callable[[str, int, int], None]
"""``progress(stage, done, total)``."""
Source = str | Path | LoraAdapter
CACHE_BYTES = 24 << 20
"""Thin updates kept between passes: enough for a small family, too little to matter for a large one."""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """An adapter that was left out, and why."""

    name: str
    reason: str


@dataclass
class Family:
    """Adapters of one base model."""

    adapters: list[LoraAdapter] = field(default_factory=list)
    modules: dict[str, ModuleEntry] = field(default_factory=dict)
    base: str | None = None
    energies: list[float] = field(default_factory=list)
    """Squared norm of each adapter's update over all its modules."""
    refused: list[Refused] = field(default_factory=list)
    taken: frozenset[str] = frozenset()
    """Names of members of the bank that the adapters are to join."""
    _cache: dict[tuple[int, str], ThinUpdate] = field(default_factory=dict)
    _cached_bytes: int = 0

    def names(self) -> list[str]:
        """Names of the adapters, in order."""
        return [a.name for a in self.adapters]

    def module_names(self) -> list[str]:
        """Names of all modules that any adapter has, sorted."""
        return sorted(self.modules)

    def weight(self, i: int) -> float:
        """What a unit of squared error of adapter ``i`` costs: 1 over its energy, so that no adapter is sacrificed."""
        return 1 / self.energies[i] if self.energies[i] > 0 else 0.0

    def update(self, i: int, module: str) -> ThinUpdate:
        """Thin SVD of one module of adapter ``i``."""
        key = (i, module)
        if key in self._cache:
            return self._cache[key]
        factors = self.adapters[i].factors(module)
        update = thin_svd(factors.A, factors.B, factors.scale)
        size = 4 * (update.U.numel() + update.Vh.numel())
        if self._cached_bytes + size <= CACHE_BYTES:
            self._cache[key] = update
            self._cached_bytes += size
        return update

    def values(self, i: int) -> int:
        """Values of all A and B of adapter ``i``."""
        return sum(s.rank * (s.d_in + s.d_out) for s in self.adapters[i].modules.values())

    def add(self, adapter: LoraAdapter, base: str | None = None) -> None:
        """Compare an adapter with those that are here, measure it, and take it in.

        Raises:
            AdapterError: If it has another base or other shapes (naming both adapters and both values), a name that is
                taken, or values that are not finite.
        """
        self._check_name(adapter)
        if base is None:
            self._check_base(adapter)
        self._check_shapes(adapter)
        energy = 0.0
        for module in adapter.modules:
            factors = adapter.factors(module)
            energy += update_norm(factors.A, factors.B, factors.scale) ** 2
        self.base = base_model_id(base) or self.base or adapter.base
        for module, shape in adapter.modules.items():
            self.modules.setdefault(module, ModuleEntry(name=module, d_in=shape.d_in, d_out=shape.d_out))
        self.adapters.append(adapter)
        self.energies.append(energy)

    def _check_name(self, adapter: LoraAdapter) -> None:
        for other in self.adapters:
            if other.name.casefold() == adapter.name.casefold():
                raise AdapterError(
                    f"two adapters are named {adapter.name!r}"
                    + (f" (and {other.name!r})" if other.name != adapter.name else "")
                    + "; give one another name as NAME=PATH"
                )
        held = [name for name in self.taken if name.casefold() == adapter.name.casefold()]
        if held:
            raise AdapterError(f"the bank has a member {held[0]!r} already; remove it first or give NAME=PATH")

    def _check_base(self, adapter: LoraAdapter) -> None:
        if self.base is None or adapter.base is None or adapter.base == self.base:
            return
        other = next((a for a in self.adapters if a.base == self.base), None)
        holder = f"adapter {other.name!r}" if other else "the bank"
        raise AdapterError(
            f"adapter {adapter.name!r} was trained on {adapter.base!r}, {holder} on {self.base!r}; "
            "fit one bank per base model, or name the base with --base if the two are the same"
        )

    def _check_shapes(self, adapter: LoraAdapter) -> None:
        for module, shape in adapter.modules.items():
            known = self.modules.get(module)
            if known is None or (known.d_in, known.d_out) == (shape.d_in, shape.d_out):
                continue
            other = next((a.name for a in self.adapters if module in a.modules), None)
            holder = f"adapter {other!r}" if other else "the bank"
            raise AdapterError(
                f"adapter {adapter.name!r}, {module}: the layer is {shape.d_in} -> {shape.d_out}, in {holder} it is "
                f"{known.d_in} -> {known.d_out}; they belong to different base models"
            )


def open_source(name: str | None, source: Source, *, allow_pickle: bool) -> LoraAdapter:
    """Open one adapter under ``name``, or its own."""
    if not isinstance(source, LoraAdapter):
        return LoraAdapter.load(source, name=name, allow_pickle=allow_pickle)
    return source if name is None else replace(source, name=check_name(name))


def open_family(
    sources: Mapping[str, Source] | Iterable[Source],
    *,
    base: str | None = None,
    skip_bad: bool = False,
    allow_pickle: bool = False,
    into: Family | None = None,
    opener: Callable[..., LoraAdapter] = open_source,
    progress: Progress | None = None,
) -> Family:
    """Open adapters, refuse what can't be used, and measure the rest.

    Args:
        sources: PEFT directories, files, hub ids or adapters; ``NAME=PATH`` or a mapping names them.
        base: Name of the base model, if the adapters' own words about it are not to be compared.
        skip_bad: List refused adapters in ``refused`` instead of stopping at the first.
        allow_pickle: See ``LoraAdapter.load``.
        into: A family that already has members; a new one by default.
        opener: Opens one source, as ``open_source``.
        progress: Called after each adapter.

    Raises:
        AdapterError: At the first adapter that can't be used, unless ``skip_bad``.
        MissingFileError: If there is nothing at a path.
        BankError: If no adapter is left.
    """
    named = named_sources(sources)
    family = into or Family()
    if base is not None:
        family.base = base_model_id(base)
    for done, (name, source) in enumerate(named, start=1):
        try:
            family.add(opener(name, source, allow_pickle=allow_pickle), base)
        except AdapterBankError as error:
            if not skip_bad:
                raise
            family.refused.append(Refused(name=name or str(source), reason=str(error)))
        if progress:
            progress("reading", done, len(named))
    if not family.adapters:
        reasons = "; ".join(r.reason for r in family.refused[:3])
        raise BankError(f"there is no adapter to fit{': ' + reasons if reasons else '; give at least one'}")
    return family


def named_sources(sources: Mapping[str, Source] | Iterable[Source]) -> Sequence[tuple[str | None, Source]]:
    """``(name, source)`` of each source; no name means the source's own.

    Raises:
        BankError: If a single path was given instead of a list.
    """
    if isinstance(sources, (str, Path, LoraAdapter)):
        raise BankError(f"give a list of adapters, not one: [{str(sources)!r}]")
    if isinstance(sources, Mapping):
        return list(sources.items())
    return [split_name(source) if isinstance(source, str) else (None, source) for source in sources]
