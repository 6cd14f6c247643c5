"""In one sentence: did sharing pay?"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from adapterbank.bank.bank import Bank
from adapterbank.bank.coding import PlainBasis
from adapterbank.bank.family import Family, Source, named_sources, open_source
from adapterbank.bank.statistics import Directions, even_sample, measure
from adapterbank.codec.allocate import allocate
from adapterbank.codec.predictive import ModuleBasis
from adapterbank.errors import BankError
from adapterbank.subspace.starts import same_start

PAYS = 0.05
"""Share of its bytes that a bank must save by sharing before we say that it pays; less is the estimate's error."""
MOST_MODULES, ADVICE_ADAPTERS, ADVICE_STARTS = 24, 16, 4
"""Modules and adapters that the sentence is based on, evenly spaced, and modules in which their starts are compared."""


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
    directions = [k for sides in bank.directions().values() for k in sides]
    if not any(directions):
        return _no(
            0.0, "Sharing does not pay here: no shared direction was worth its bytes, so every adapter is coded alone."
        )
    error = bank.summary()["error"]
    if error >= 1:
        return _no(0.0, f"An error of {error:.2f} is no better than none of these adapters at all; ask for more bytes.")
    refused = {r.name for r in bank.refused}
    given = [pair for pair in named_sources(adapters) if (pair[0] or str(pair[1])) not in refused]
    opened = Family()
    for name, source in (given[i] for i in even_sample([str(pair) for pair in given], ADVICE_ADAPTERS)):
        opened.add(open_source(name, source, allow_pickle=allow_pickle), bank.index.base)
    family = part_of(opened, ADVICE_ADAPTERS, MOST_MODULES)
    if not (any(family.energies) and error > 0):
        return _no(0.0, "These updates are zero, or come back exactly: there is nothing that sharing could save.")
    plain = bank.index.coding != "predictive"
    # the papers' methods and a fixed k share on both sides, asked or not
    output_shares = plain or any(directions[1::2])
    return _verdict(_saving(bank, family, error), error, _alike(family), len(family.adapters), output_shares, plain)


def _saving(bank: Bank, family: Family, error: float) -> float:
    """Share of the bytes that the bank's basis saves, by what the allocation expects of a part of its adapters."""
    statistics, sampled = measure(family, no_directions(family), None)
    alone = allocate(statistics, adapters=len(bank), sampled=sampled, error=error).bits
    if bank.index.coding != "predictive":
        members = bank.index.members.values()
        part = values_of(family) * len(bank) / len(family.adapters) / sum(m.values for m in members)
        return 1 - 8 * part * (bank.index.basis_bytes + sum(m.bytes for m in members)) / alone if alone else 0.0
    decoded = bank.bases
    bases = {module.name: basis for module, basis in zip(bank.index.modules, decoded, strict=True)}
    share = len(bank) / sampled
    stored = [_stored_directions(family, name, bases[name], share) for name in family.module_names()]
    statistics, sampled = measure(family, stored, None)
    sizes = tuple((len(found.V), len(found.U)) for found in stored)
    shared = allocate(statistics, adapters=len(bank), sampled=sampled, error=error, sizes=sizes).bits
    return 1 - shared / alone if alone else 0.0


def _alike(family: Family) -> int:
    """How many of the adapters share a start with another one, in the median of a few modules."""
    counts = []
    names = family.module_names()
    for name in (names[i] for i in even_sample(names, ADVICE_STARTS)):
        factors = [a.factors(name).A for a in family.adapters if name in a.modules]
        counts.append(sum(len(group) for group in same_start(factors).groups))
    return sorted(counts)[len(counts) // 2]


def _stored_directions(family: Family, module: str, basis: ModuleBasis | PlainBasis, share: float) -> Directions:
    """What a predictive bank stores of a module, and the energy along it, scaled from the adapters at hand to all."""
    if not isinstance(basis, ModuleBasis):
        raise BankError(f"{module} has no predictive basis")
    # decoded directions are a little skew, and energies add up only along orthonormal ones
    V, U = (torch.linalg.qr(side.vectors.T).Q.T for side in (basis.side_in, basis.side_out))
    weight_in, weight_out = torch.zeros(len(V)), torch.zeros(len(U))
    for i in members_of(family, module):
        update, weight = family.update(i, module), share * family.weight(i)
        weight_in += weight * (update.S[:, None] * (update.Vh @ V.T)).square().sum(dim=0)
        weight_out += weight * (update.S[:, None] * (update.U.T @ U.T)).square().sum(dim=0)
    return Directions(
        module=family.modules[module], V=V, U=U,
        weight_in=weight_in.double().numpy(), weight_out=weight_out.double().numpy(),
    )  # fmt: skip


# --- sentences ------------------------------------------------------------------------------------------------------


def forecast(savings: Mapping[float, float], n: int, alike: int, output_shares: bool) -> Advice:
    """Say whether sharing would pay, before a fit.

    Args:
        savings: Share of the bytes saved at each error; of these 0.05 and 0.2 are quoted.
        n: Number of adapters.
        alike: How many of them share a start with another one.
        output_shares: Whether the output sides have more in common than by chance.
    """
    if n < 2:
        return _no(0.0, "A single adapter has nothing to share: a bank only codes it compactly.")
    if not savings:
        return _no(0.0, "These updates are all zero: there is nothing that sharing could save.")
    fine, coarse = savings[0.05], savings[0.2]
    saving = max(fine, coarse)
    if saving < PAYS:
        text = f"A shared basis does not pay here: at an error of 0.05 or 0.2 the bank is {_told(saving)} one."
        return _no(saving, text)
    text = f"A shared basis pays: the bank is {_told(fine)} one at an error of 0.05, and {_told(coarse)} one at 0.2"
    return _with_start(saving, text, alike, n, output_shares)


def _verdict(saving: float, error: float, alike: int, n: int, output_shares: bool, plain: bool) -> Advice:
    at = f"at this bank's error of {error:.2g}"
    if saving < PAYS:
        way_out = "; leave out --method, -k and --no-quantize, and each side gets what it is worth" if plain else ""
        return _no(saving, f"Sharing does not pay here: {at} the bank is {_told(saving)} a shared basis{way_out}.")
    text = f"A shared basis pays: {at} the bank is {_told(saving)} one"
    return _with_start(saving, text, alike, n, output_shares)


def _no(saving: float, text: str) -> Advice:
    return Advice(pays=False, saving=saving, only_start=False, text=text)


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


# --- what is looked at ----------------------------------------------------------------------------------------------


def part_of(family: Family, adapters: int, modules: int) -> Family:
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


def members_of(family: Family, module: str) -> list[int]:
    """Which adapters have a module."""
    return [i for i, adapter in enumerate(family.adapters) if module in adapter.modules]


def values_of(family: Family) -> int:
    """Values of all A and B of the family's modules."""
    shapes = (a.modules[name] for a in family.adapters for name in family.modules if name in a.modules)
    return sum(shape.rank * (shape.d_in + shape.d_out) for shape in shapes)


def no_directions(family: Family) -> list[Directions]:
    """For every module: nothing shared."""
    none = np.zeros(0)
    return [
        Directions(module=m, V=torch.zeros(0, m.d_in), U=torch.zeros(0, m.d_out), weight_in=none, weight_out=none)
        for m in (family.modules[name] for name in family.module_names())
    ]
