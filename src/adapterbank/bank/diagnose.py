"""Does a shared basis pay for these adapters? Measured before a fit, and in one sentence after it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from adapterbank.adapters import LoraFactors
from adapterbank.bank.bank import Bank
from adapterbank.bank.coding import PlainBasis
from adapterbank.bank.family import Family, Progress, Refused, Source, named_sources, open_family, open_source
from adapterbank.bank.statistics import Directions, even_sample, find_directions, measure
from adapterbank.codec.allocate import allocate, basis_sizes
from adapterbank.codec.predictive import ModuleBasis
from adapterbank.errors import BankError
from adapterbank.subspace.baselines import Coded, quantized
from adapterbank.subspace.diagnosis import ModuleDiagnosis, combine, spectrum_against_null
from adapterbank.subspace.heldout import leave_one_out
from adapterbank.subspace.starts import same_start
from adapterbank.subspace.updates import ThinUpdate, balanced, difference_norm, truncate

MOST_MODULES, MOST_ADAPTERS, MOST_ROWS = 24, 64, 512
"""What a diagnosis looks at, evenly spaced; rows are those of one module, stacked, and the cost is cubic in them."""
FOLDS = 4
"""Groups that more than 16 adapters are held out in: four fits of a module instead of sixteen."""
RIVAL_ADAPTERS = 16
"""Adapters that the rivals code; each is coded alone, so a few stand for all."""
TARGETS = (0.01, 0.05, 0.1, 0.2, 0.4)
"""Errors at which the methods' bytes are compared."""
PAYS = 0.05
"""Share of its bytes that a bank must save by sharing before we say that it pays; less is the estimate's error."""
ADVICE_ADAPTERS, ADVICE_STARTS = 16, 4
"""Adapters, and modules for the likeness of their starts, that the sentence after a fit is based on."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Whether sharing pays."""

    pays: bool
    saving: float
    """Share of the bytes that the shared basis saves at the same error; negative where it costs more than it saves."""
    only_start: bool
    """What is shared is only one random initialisation of A."""
    text: str
    """One sentence."""


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
    family = _part(opened, max(MOST_ROWS // rank, 8), MOST_MODULES)
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
        outliers=tuple(names[i] for i in together.outliers), modules=tuple(modules),
        values=_values(family), comparison=comparison,
        advice=_forecast(comparison, len(names), alike, output_shares), refused=tuple(opened.refused),
    )  # fmt: skip


def advice(bank: Bank, adapters: Mapping[str, Source] | Iterable[Source], *, allow_pickle: bool = False) -> Advice:
    """Say in one sentence whether sharing paid in a bank that was just fitted; far cheaper than the fit.

    Up to 16 adapters and 24 modules are read again, and the bytes that they would take without any shared direction
    at the bank's own error are compared with those that they take.

    Args:
        bank: The bank.
        adapters: What it was fitted on; those in ``bank.refused`` are left out.
        allow_pickle: As in ``Bank.fit``.

    Raises:
        AdapterError: If an adapter can't be used any more.
        MissingFileError: If there is nothing at a path any more.
    """
    if len(bank) < 2:
        return _no(0.0, "A single adapter has nothing to share: the bank only codes it compactly.")
    directions = bank.directions()
    predictive = bank.index.coding == "predictive"
    if predictive and not any(k for sides in directions.values() for k in sides):
        return _no(
            0.0, "Sharing does not pay here: no shared direction was worth its bytes, so every adapter is coded alone."
        )
    error = bank.summary()["error"]
    if error >= 1:
        return _no(0.0, f"An error of {error:.2f} is no better than none of these adapters at all; ask for more bytes.")
    refused = {r.name for r in bank.refused}
    given = [pair for pair in named_sources(adapters) if (pair[0] or str(pair[1])) not in refused]
    chosen = [given[i] for i in even_sample([str(pair) for pair in given], ADVICE_ADAPTERS)]
    opened = Family()
    for name, source in chosen:
        opened.add(open_source(name, source, allow_pickle=allow_pickle), bank.index.base)
    family = _part(opened, ADVICE_ADAPTERS, MOST_MODULES)
    if not (any(family.energies) and error > 0):
        return _no(0.0, "These updates are zero, or come back exactly: there is nothing that sharing could save.")
    statistics, sampled = measure(family, _no_directions(family), None)
    alone = allocate(statistics, adapters=len(bank), sampled=sampled, error=error).bits
    if predictive:
        decoded: Sequence[ModuleBasis | PlainBasis] = bank._decoded_bases()
        bases = {module.name: basis for module, basis in zip(bank.index.modules, decoded, strict=True)}
        share = len(bank) / sampled
        stored = [_stored_directions(family, name, bases[name], share) for name in family.module_names()]
        statistics, sampled = measure(family, stored, None)
        sizes = tuple(directions[name] for name in family.module_names())
        taken = allocate(statistics, adapters=len(bank), sampled=sampled, error=error, sizes=sizes).bits
    else:
        members = bank.index.members.values()
        # to the part that was looked at
        part = _values(family) * len(bank) / len(family.adapters) / sum(m.values for m in members)
        taken = 8 * part * (bank.index.basis_bytes + sum(m.bytes for m in members))
    saving = 1 - taken / alone if alone else 0.0
    alike = _alike(family)
    output_side = not predictive or any(k_out for _, k_out in directions.values())
    return _verdict(saving, error, alike, len(family.adapters), output_side, plain=not predictive)


# --- sentences ------------------------------------------------------------------------------------------------------


def _no(saving: float, text: str) -> Advice:
    return Advice(pays=False, saving=saving, only_start=False, text=text)


def _verdict(saving: float, error: float, alike: int, n: int, output_shares: bool, *, plain: bool) -> Advice:
    at = f"at this bank's error of {error:.2g}"
    if saving < PAYS:
        way_out = "; leave out --method, -k and --no-quantize, and each side gets what it is worth" if plain else ""
        return _no(saving, f"Sharing does not pay here: {at} the bank is {_told(saving)} a shared basis{way_out}.")
    text = f"A shared basis pays: {at} the bank is {_told(saving)} one"
    return _with_start(saving, text, alike, n, output_shares)


def _told(saving: float) -> str:
    if abs(saving) < 0.005:
        return "no smaller than without"
    if saving < -1:
        return f"{1 - saving:.1f} times as large as without"
    return f"{100 * abs(saving):.0f} % {'smaller' if saving > 0 else 'larger'} than without"


def _with_start(saving: float, text: str, alike: int, n: int, output_shares: bool) -> Advice:
    if alike <= n / 2:
        return Advice(pays=True, saving=saving, only_start=False, text=f"{text}.")
    if output_shares:
        text += f", and not only because {alike} of {n} adapters began with the same random A."
    else:
        text += f", but all that is shared is the random A that {alike} of {n} adapters began with."
    return Advice(pays=True, saving=saving, only_start=not output_shares, text=text)


def _forecast(comparison: Sequence[BytesAtError], n: int, alike: int, output_shares: bool) -> Advice:
    if n < 2:
        return _no(0.0, "A single adapter has nothing to share: a bank only codes it compactly.")
    savings = {}
    for row in comparison:
        bank, alone = row.bytes["bank"], row.bytes["alone"]
        if bank is not None and alone:
            savings[row.error] = 1 - bank / alone
    if not savings:
        return _no(0.0, "These updates are all zero: there is nothing that sharing could save.")
    fine, coarse = savings[0.05], savings[0.2]
    saving = max(fine, coarse)
    if saving < PAYS:
        return _no(
            saving,
            f"A shared basis does not pay here: at an error of 0.05 or 0.2 the bank is at best {_told(saving)} one.",
        )
    text = f"A shared basis pays: at an error of 0.05 the bank is {_told(fine)} one, at 0.2 {_told(coarse)}"
    return _with_start(saving, text, alike, n, output_shares)


def _alike(family: Family) -> int:
    """How many of the adapters share a start with another one, in the median of a few modules."""
    counts = []
    names = family.module_names()
    for name in (names[i] for i in even_sample(names, ADVICE_STARTS)):
        factors = [a.factors(name).A for a in family.adapters if name in a.modules]
        counts.append(sum(len(group) for group in same_start(factors).groups))
    return sorted(counts)[len(counts) // 2]


# --- measuring ------------------------------------------------------------------------------------------------------


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


def _part(family: Family, adapters: int, modules: int) -> Family:
    """The family of some of its adapters and modules, as if there were no others."""
    names = family.module_names()
    kept = [names[i] for i in even_sample(names, modules)]
    members = [family.adapters[i] for i in even_sample(family.names(), adapters)]
    members = [a for a in members if any(name in a.modules for name in kept)]
    present = [name for name in kept if any(name in a.modules for a in members)]
    part = Family(adapters=members, modules={name: family.modules[name] for name in present}, base=family.base)
    for i, adapter in enumerate(members):
        updates = [part.update(i, name) for name in present if name in adapter.modules]
        part.energies.append(sum(float(update.S.double().square().sum()) for update in updates))
    return part


def _members(family: Family, module: str) -> list[int]:
    return [i for i, adapter in enumerate(family.adapters) if module in adapter.modules]


def _rows(family: Family, module: str) -> int:
    return sum(family.adapters[i].modules[module].rank for i in _members(family, module))


def _values(family: Family) -> int:
    shapes = (a.modules[name] for a in family.adapters for name in family.modules if name in a.modules)
    return sum(shape.rank * (shape.d_in + shape.d_out) for shape in shapes)


def _rms(errors: Iterable[float]) -> float:
    squares = [error * error for error in errors]
    return float((sum(squares) / len(squares)) ** 0.5)


def _examine(family: Family, module: str, k: int, seed: int) -> ModuleDiagnosis:
    who = _members(family, module)
    updates = [family.update(i, module) for i in who]
    folds = len(who) if len(who) <= 16 else FOLDS
    return ModuleDiagnosis(
        members=tuple(who),
        spectrum=spectrum_against_null(updates, seed=seed),
        start=same_start([family.adapters[i].factors(module).A for i in who]),
        held_out=leave_one_out(updates, k, folds=folds) if len(who) > 1 else None,
    )


# --- bytes of the bank ----------------------------------------------------------------------------------------------


def _no_directions(family: Family) -> list[Directions]:
    none = np.zeros(0)
    return [
        Directions(module=m, V=torch.zeros(0, m.d_in), U=torch.zeros(0, m.d_out), weight_in=none, weight_out=none)
        for m in (family.modules[name] for name in family.module_names())
    ]


def _stored_directions(family: Family, module: str, basis: ModuleBasis | PlainBasis, share: float) -> Directions:
    """What a predictive bank stores of a module, and the energy along it, scaled from the adapters at hand to all."""
    if not isinstance(basis, ModuleBasis):
        raise BankError(f"{module} has no predictive basis")
    # decoded directions are a little skew, and energies add up only along orthonormal ones
    V, U = (torch.linalg.qr(side.vectors.T).Q.T for side in (basis.side_in, basis.side_out))
    weight_in, weight_out = torch.zeros(len(V)), torch.zeros(len(U))
    for i in _members(family, module):
        update, weight = family.update(i, module), share * family.weight(i)
        weight_in += weight * (update.S[:, None] * (update.Vh @ V.T)).square().sum(dim=0)
        weight_out += weight * (update.S[:, None] * (update.U.T @ U.T)).square().sum(dim=0)
    return Directions(
        module=family.modules[module], V=V, U=U,
        weight_in=weight_in.double().numpy(), weight_out=weight_out.double().numpy(),
    )  # fmt: skip


def _compare(family: Family, report: Progress) -> tuple[BytesAtError, ...]:
    coded = [i for i, energy in enumerate(family.energies) if energy > 0]
    if not coded:
        return ()
    names = family.names()
    rivals = _rival_points(family, [coded[i] for i in even_sample([names[i] for i in coded], RIVAL_ADAPTERS)], report)
    plans = [
        measure(family, found, None) for found in (_no_directions(family), find_directions(family, None, None, None))
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


# --- bytes of what a bank competes with -----------------------------------------------------------------------------


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
        points[setting.partition(" ")[0]].append((sizes[setting] * _values(family) / values, error))
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
