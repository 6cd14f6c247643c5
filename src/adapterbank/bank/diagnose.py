"""Does a shared basis pay for these adapters? Measured before a fit, beside chance and beside what needs no basis."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from adapterbank.adapters import LoraFactors
from adapterbank.bank.advice import (
    MOST_MODULES,
    Advice,
    forecast,
    members_of,
    no_directions,
    part_of,
    values_of,
)
from adapterbank.bank.family import Family, Progress, Refused, Source, open_family
from adapterbank.bank.statistics import even_sample, find_directions, measure
from adapterbank.codec.allocate import allocate, basis_sizes
from adapterbank.errors import BankError
from adapterbank.subspace.baselines import Coded, quantized
from adapterbank.subspace.diagnosis import ModuleDiagnosis, combine, spectrum_against_null
from adapterbank.subspace.heldout import leave_one_out
from adapterbank.subspace.starts import same_start
from adapterbank.subspace.updates import ThinUpdate, balanced, difference_norm, truncate

MOST_ADAPTERS, MOST_ROWS = 64, 512
"""What a diagnosis looks at, evenly spaced; rows are those of one module, stacked, and the cost is cubic in them."""
FOLDS = 4
"""Groups that more than 16 adapters are held out in: four fits of a module instead of sixteen."""
RIVAL_ADAPTERS = 16
"""Adapters that the rivals code; each is coded alone, so a few stand for all."""
TARGETS = (0.01, 0.05, 0.1, 0.2, 0.4)
"""Errors at which the methods' bytes are compared."""


@dataclass(frozen=True, kw_only=True)
class ModuleReport:
    """One module: shares of energy in the first ``k`` directions beside chance, and the error held out."""

    name: str
    adapters: int
    """How many of the examined adapters have it."""
    rows: int
    """Sum of their ranks: with ``k`` near it any spectrum looks explained."""
    real_in: float
    null_in: float
    """The same for updates of equal strength in random directions."""
    real_out: float
    null_out: float
    mean_cosine: float
    """Of rows of A over all pairs of adapters: near 0 between private seeds."""
    start_groups: tuple[tuple[str, ...], ...]
    """Adapters whose A still shows the same initialisation."""
    held_out_error: float | None
    """Root mean square over adapters, each in a basis fitted without it; none with a single adapter."""


@dataclass(frozen=True, kw_only=True)
class BytesAtError:
    """What the methods need to reach one error of the update (root mean square over adapters)."""

    error: float
    bytes: Mapping[str, int | None]
    """Bytes of codes, without headers, by method: ``int8``, ``int4``, ``svd`` (16 bits), ``svd+int8``, ``svd+int4``,
    ``alone`` (the bank's coding without any shared direction), ``bank``; None where no setting reaches the error."""

    @property
    def saving(self) -> float:
        """Share of the bank's bytes that sharing saves."""
        bank, alone = self.bytes["bank"], self.bytes["alone"]
        return 1 - bank / alone if bank is not None and alone else 0.0


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What adapters have in common and whether a bank gains by it. Made by :func:`diagnose`."""

    adapters: tuple[str, ...]
    """Those that were examined; the numbers below are of these and of the examined modules alone."""
    of_adapters: int
    """How many were given, less refused ones."""
    of_modules: int
    k: int
    """Directions a side at which the spectra are read."""
    real_in: float
    """Share of energy that ``k`` directions explain on the input side, mean over modules."""
    null_in: float
    """The same by chance."""
    real_out: float
    null_out: float
    mean_cosine: float
    start_groups: tuple[tuple[str, ...], ...]
    """Adapters that share an initialisation of A in more than half of their modules."""
    held_out_errors: Mapping[str, float]
    """Relative error of each adapter's update in bases fitted without it: 1 means the others know nothing of it."""
    outliers: tuple[str, ...]
    """Adapters far worse predicted than the others."""
    modules: tuple[ModuleReport, ...]
    values: int
    """Values of all A and B of what was examined."""
    comparison: tuple[BytesAtError, ...]
    advice: Advice
    refused: tuple[Refused, ...]
    """Adapters that ``skip_bad`` left out."""

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(asdict(self), allow_nan=False)


def diagnose(
    adapters: Mapping[str, Source] | Iterable[Source],
    *,
    k: int | None = None,
    base: str | None = None,
    skip_bad: bool = False,
    allow_pickle: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Diagnosis:
    """Measure what adapters share, against chance, and what sharing would save.

    Looks at up to 64 adapters (fewer of high rank) and 24 modules, evenly spaced; the rest is not even opened.

    Args:
        adapters: As in ``Bank.fit``.
        k: Directions a side at which spectra are read; by default twice the largest rank or half the rows.
        base: As in ``Bank.fit``.
        skip_bad: As in ``Bank.fit``.
        allow_pickle: As in ``Bank.fit``.
        seed: Of the random nulls.
        progress: Called with ``(stage, done, total)``.

    Raises:
        AdapterError: If an adapter can't be used, or two don't belong together.
        MissingFileError: If there is nothing at a path.
        BankError: If there is no adapter, or ``k`` is below 1.
    """
    if k is not None and k < 1:
        raise BankError(f"k must be at least 1, not {k}")
    chosen, given = _sampled(adapters, MOST_ADAPTERS)
    opened = open_family(chosen, base=base, skip_bad=skip_bad, allow_pickle=allow_pickle, progress=progress)
    rank = max(shape.rank for adapter in opened.adapters for shape in adapter.modules.values())
    family = part_of(opened, max(MOST_ROWS // rank, 8), MOST_MODULES)
    report: Progress = progress or (lambda stage, done, total: None)

    most_rows = max(_rows(family, module) for module in family.modules)
    k = k or max(min(2 * rank, most_rows // 2), 1)
    examined = []
    for done, name in enumerate(family.module_names(), start=1):
        examined.append(_examine(family, name, k, seed))
        report("examining modules", done, len(family.modules))
    together = combine(examined, k)
    names = family.names()
    comparison = _compare(family, report)

    def named(groups: Sequence[Sequence[int]], who: Sequence[int] | None = None) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(names[i if who is None else who[i]] for i in group) for group in groups)

    modules = []
    for name, module in zip(family.module_names(), examined, strict=True):
        real_in, null_in, real_out, null_out = module.spectrum.at(k)
        modules.append(
            ModuleReport(
                name=name, adapters=len(module.members), rows=module.spectrum.rows,
                real_in=real_in, null_in=null_in, real_out=real_out, null_out=null_out,
                mean_cosine=module.start.mean_cosine,
                start_groups=named(module.start.groups, module.members),
                held_out_error=None if module.held_out is None else _rms(module.held_out.errors),
            )
        )  # fmt: skip
    alike = sum(len(group) for group in together.start_groups)
    # the same rule that says whether either side shares, asked of the output side alone
    output_shares = replace(together, real_in=0.0, null_in=0.0).shares
    return Diagnosis(
        adapters=tuple(names), of_adapters=given - len(opened.refused), of_modules=len(opened.modules), k=k,
        real_in=together.real_in, null_in=together.null_in, real_out=together.real_out, null_out=together.null_out,
        mean_cosine=together.mean_cosine, start_groups=named(together.start_groups),
        held_out_errors={names[i]: error for i, error in together.held_out_errors.items()},
        outliers=tuple(names[i] for i in together.outliers if len(names) > 3), modules=tuple(modules),
        values=values_of(family), comparison=comparison,
        advice=forecast({row.error: row.saving for row in comparison}, len(names), alike, output_shares),
        refused=tuple(opened.refused),
    )  # fmt: skip


def _sampled(
    adapters: Mapping[str, Source] | Iterable[Source], most: int
) -> tuple[Mapping[str, Source] | Iterable[Source], int]:
    """Evenly spaced adapters, and how many there were."""
    if isinstance(adapters, Mapping):
        names = list(adapters)
        return {names[i]: adapters[names[i]] for i in even_sample(names, most)}, len(names)
    if isinstance(adapters, (str, bytes)) or not isinstance(adapters, Iterable):
        raise BankError(f"give a list of adapters, not one: [{str(adapters)!r}]")
    given = list(adapters)
    return [given[i] for i in even_sample([str(source) for source in given], most)], len(given)


def _rows(family: Family, module: str) -> int:
    return sum(family.adapters[i].modules[module].rank for i in members_of(family, module))


def _rms(errors: Iterable[float]) -> float:
    squares = [error * error for error in errors]
    return float((sum(squares) / len(squares)) ** 0.5)


def _examine(family: Family, module: str, k: int, seed: int) -> ModuleDiagnosis:
    who = members_of(family, module)
    updates = [family.update(i, module) for i in who]
    folds = len(who) if len(who) <= 16 else FOLDS
    return ModuleDiagnosis(
        members=tuple(who),
        spectrum=spectrum_against_null(updates, seed=seed),
        start=same_start([family.adapters[i].factors(module).A for i in who]),
        held_out=leave_one_out(updates, k, folds=folds) if len(who) > 1 else None,
    )


# --- bytes at the same error ----------------------------------------------------------------------------------------


def _compare(family: Family, report: Progress) -> tuple[BytesAtError, ...]:
    coded = [i for i, energy in enumerate(family.energies) if energy > 0]
    if not coded:
        return ()
    names = family.names()
    rivals = _rival_points(family, [coded[i] for i in even_sample([names[i] for i in coded], RIVAL_ADAPTERS)], report)
    plans = [
        measure(family, found, None) for found in (no_directions(family), find_directions(family, None, None, None))
    ]
    rows = []
    for done, error in enumerate(TARGETS, start=1):
        bits = [allocate(plan, adapters=len(coded), sampled=sampled, error=error).bits for plan, sampled in plans]
        needed = {
            method: min((int(size) for size, reached in points if reached <= error), default=None)
            for method, points in rivals.items()
        }
        needed |= {"alone": int(bits[0] / 8), "bank": int(min(bits) / 8)}
        rows.append(BytesAtError(error=error, bytes=needed))
        report("sizing the bank", done, len(TARGETS))
    return tuple(rows)


def _rival_points(family: Family, sample: list[int], report: Progress) -> dict[str, list[tuple[float, float]]]:
    """``(bytes of all adapters, error)`` that each setting of each method reaches."""
    lost: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}
    values, most = 0, max(shape.rank for i in sample for shape in family.adapters[i].modules.values())
    for position, i in enumerate(sample):
        for module in family.module_names():
            if module not in family.adapters[i].modules:
                continue
            factors, update = family.adapters[i].factors(module), family.update(i, module)
            values += factors.A.numel() + factors.B.numel()
            for setting, coded in _rival_codes(factors, update, most):
                sizes[setting] = sizes.get(setting, 0) + coded.bytes
                squared = difference_norm(update, coded.A, coded.B) ** 2
                lost.setdefault(setting, [0.0] * len(sample))[position] += squared
        report("coding alone", position + 1, len(sample))
    points: dict[str, list[tuple[float, float]]] = {m: [] for m in ("int8", "int4", "svd", "svd+int8", "svd+int4")}
    for setting, parts in lost.items():
        error = _rms((part * family.weight(i)) ** 0.5 for part, i in zip(parts, sample, strict=True))
        points[setting.partition(" ")[0]].append((sizes[setting] * values_of(family) / values, error))
    return points


def _rival_codes(factors: LoraFactors, update: ThinUpdate, most: int) -> list[tuple[str, Coded]]:
    """The methods of ``subspace.baselines`` at every setting, named ``method setting``, from one SVD.

    Settings go up to rank ``most`` for every adapter: one of lower rank counts with all it has.
    """
    codes = [(f"int{bits}", quantized(factors.A, factors.B, factors.scale, bits=bits)) for bits in (8, 4)]
    for kept in basis_sizes(most)[1:]:
        A, B = balanced(truncate(update, kept))
        half = Coded(A=A.half().float(), B=B.half().float(), bytes=2 * (A.numel() + B.numel()))
        codes.append((f"svd {kept}", half))
        codes += [(f"svd+int{bits} {kept}", quantized(A, B, bits=bits)) for bits in (8, 4)]
    return codes
