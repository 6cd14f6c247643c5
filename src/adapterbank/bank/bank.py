"""The bank: many LoRA adapters of one base model on a shared basis."""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapterbank.adapters import LoraAdapter, check_name
from adapterbank.bank import store
from adapterbank.bank.family import Family, Progress, Refused, Source, named_sources, open_family
from adapterbank.bank.fit import fit_bank
from adapterbank.bank.index import BankIndex, MemberEntry
from adapterbank.bank.joining import TaskOpener
from adapterbank.bank.members import Coded, MemberCoder, MemberConfigs, PlainCoder, PredictiveCoder, TaskCoder
from adapterbank.bank.partial import PartialFit
from adapterbank.bank.restoring import Basis, decode_bases, relative_error, restore
from adapterbank.bank.settings import FitSettings, check_positive, parse_bytes
from adapterbank.bank.shared_basis import BankBasis, basis_members, shared_basis, with_random
from adapterbank.bank.staging import Staging
from adapterbank.bank.task import restore_task
from adapterbank.bank.writing import bank_bytes
from adapterbank.errors import BankError, UnknownNameError
from adapterbank.subspace.eigenlora import Mean

Sources = Mapping[str, Source] | Iterable[Source]
KEPT_BASES = 4
"""Derived bases that stay in memory."""
RECODED_ERROR = 1e-6
"""Of a trained task that is coded as an ordinary member because its basis goes: about float32's own rounding."""
RECODED_SHARE = 0.1
"""What that may add to the error of a task that was coded before, as a share of it."""
MOST_RECODED_ERROR = 1e-3
"""Plain banks can't choose the error; above this one a member that tasks need stays."""


class Bank:
    """Many adapters on a shared basis. Made by :meth:`fit` or :meth:`load`; changes live in memory until :meth:`save`.

    Opening a bank reads its index only; a member is read, checked and decoded when it is asked for.
    """

    def __init__(self, index: BankIndex, directory: Path) -> None:
        """Use :meth:`fit` or :meth:`load`."""
        self._index = index
        self._directory = directory
        self._staging = Staging()
        self._bases: Sequence[Basis] | None = None
        self._shared: dict[Any, BankBasis] = {}
        self.refused: list[Refused] = []
        """Adapters that the last fit, add or absorb left out, with ``skip_bad``."""

    # --- making, opening, saving ------------------------------------------------------------------------------------

    @classmethod
    def fit(
        cls,
        adapters: Sources,
        *,
        ratio: float | None = None,
        budget: int | str | None = None,
        max_error: float | None = None,
        k: int | None = None,
        method: str = "product",
        quantize: bool = True,
        mean: Mean = "affine",
        balance: bool = False,
        base: str | None = None,
        skip_bad: bool = False,
        allow_pickle: bool = False,
        seed: int = 0,
        partial: PartialFit | None = None,
        progress: Progress | None = None,
    ) -> "Bank":
        """Fit a bank on adapters of one base model.

        Args:
            adapters: PEFT directories, files, hub ids or ``LoraAdapter``s; a mapping or ``NAME=PATH`` names them.
            ratio: Bytes of all A and B in float32, over bytes of the bank; or
            budget: bytes of the bank, as a number or ``"20MB"``; or
            max_error: largest relative error ``||dW - dW'|| / ||dW||`` of any adapter. Default 0.05.
            k: Exactly so many shared directions a side. Alone: no private remainders, 16-bit values.
            method: ``product`` fits the updates themselves; ``eigenlora`` (Algorithm 1 of arXiv:2502.04700) and
            ``flat``
                are the papers', for comparison and reproduction, and need ``k``, ``ratio`` or ``budget``.
            quantize: Off: 32-bit floats.
            mean: Of the papers' methods: ``affine`` (the paper), ``drop`` (its official code) or ``none``.
            balance: Of the papers' methods: balance A and B first.
            base: Id of the base model, instead of what the adapters say, which is then not compared.
            skip_bad: Leave out adapters that can't be used and list them in ``refused``.
            allow_pickle: Also read ``.bin`` adapters.
            seed: Of the randomised range finder for large families; the same seed gives the same bytes.
            partial: Joined sketches of these adapters, from :meth:`partial`.
            progress: Called with ``(stage, done, total)``.

        Raises:
            AdapterError: If an adapter can't be used, or two don't belong together.
            MissingFileError: If there is nothing at a path.
            BankError: If the arguments contradict each other, or the target can't be met.
        """
        settings = FitSettings(
            method=method, k=k, ratio=ratio, budget=None if budget is None else parse_bytes(budget),
            max_error=max_error, quantize=quantize, mean=mean, balance=balance, seed=seed,
        )  # fmt: skip
        family = open_family(adapters, base=base, skip_bad=skip_bad, allow_pickle=allow_pickle, progress=progress)
        return cls._fitted(family, settings, partial, progress)

    @classmethod
    def _fitted(
        cls, family: Family, settings: FitSettings, partial: PartialFit | None, progress: Progress | None
    ) -> "Bank":
        if partial is not None and sorted(partial.adapters) != sorted(family.names()):
            raise BankError(f"the sketch is of {len(partial.adapters)} adapters, not of these {len(family.adapters)}")
        staging = Staging()
        index = fit_bank(family, settings, staging.path, partial=partial, progress=progress)
        bank = cls(index, staging.path)
        bank._staging = staging
        bank.refused = family.refused
        return bank

    @staticmethod
    def partial(
        adapters: Sources, *, base: str | None = None, skip_bad: bool = False, progress: Progress | None = None
    ) -> PartialFit:
        """Sketch some of the adapters of a fit; sketches are saved, sent, and merged in any order.

        Args:
            adapters: As in :meth:`fit`.
            base: As in :meth:`fit`.
            skip_bad: As in :meth:`fit`.
            progress: Called with ``(stage, done, total)``.
        """
        return PartialFit.of(open_family(adapters, base=base, skip_bad=skip_bad, progress=progress), progress)

    @classmethod
    def load(cls, path: str | Path) -> "Bank":
        """Open a bank; only its index is read.

        Raises:
            MissingFileError: If there is no bank.
            BankError: If it is damaged or of a newer format.
        """
        directory = Path(path).expanduser()
        return cls(store.read_index(directory), directory)

    def save(self, path: str | Path) -> None:
        """Write the bank to a directory, all or nothing; a bank that is there is replaced.

        Raises:
            BankError: If the directory holds something else or can't be written.
        """
        directory = Path(path).expanduser()
        with store.locked(directory):
            self._save(directory)

    def _save(self, directory: Path) -> None:
        names = [(store.basis_file(self._index.basis), self._index.basis)]
        names += [(store.member_file(m.sha256), m.sha256) for m in self._index.members.values()]
        for name, digest in names:
            held = self._find(name).parent
            if held.absolute() != directory.absolute():
                store.write_file(directory, name, store.read_bytes(held, name, digest), digest)
            elif not (held / name).exists():
                raise store.gone(held / name)
        store.commit(directory, self._index)
        self._directory = directory

    @classmethod
    @contextmanager
    def edit(cls, path: str | Path) -> Iterator["Bank"]:
        """Change a bank on disk: lock, read, let the caller change it, save. Two at once wait for each other.

        An error inside leaves the bank as it was.
        """
        directory = Path(path).expanduser()
        store.read_index(directory)  # a missing bank is an error, not a new directory
        with store.locked(directory):
            bank = cls.load(directory)
            yield bank
            bank._save(directory)

    # --- what is in it ----------------------------------------------------------------------------------------------

    @property
    def index(self) -> BankIndex:
        """Everything but the tensors."""
        return self._index

    @property
    def name(self) -> str | None:
        """Name of the directory that it was loaded from or saved to; none before."""
        return None if self.directory is None else self.directory.resolve().name

    @property
    def directory(self) -> Path | None:
        """Directory that it was loaded from or saved to; none before."""
        return None if self._staging.is_at(self._directory) else self._directory

    @property
    def names(self) -> list[str]:
        """Names of the members."""
        return list(self._index.members)

    def __len__(self) -> int:
        return len(self._index.members)

    def __contains__(self, name: object) -> bool:
        return name in self._index.members

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __getitem__(self, name: str) -> MemberEntry:
        """What the index says of a member.

        Raises:
            UnknownNameError: If there is none of that name.
        """
        entry = self._index.members.get(name)
        if entry is None:
            close = [n for n in self.names if n.casefold() == name.casefold()]
            hint = f"did you mean {close[0]!r}?" if close else f"it has {_few(self.names)}"
            raise UnknownNameError(f"the bank has no member {name!r}; {hint}")
        return entry

    def __repr__(self) -> str:
        return f"Bank({len(self)} adapters of {self._index.base}, {bank_bytes(self._index):,} bytes)"

    @property
    def bytes(self) -> int:
        """Bytes on disk of the whole bank, task heads apart."""
        return bank_bytes(self._index)

    def errors(self) -> dict[str, float]:
        """Relative error of each member's update, ``||dW - dW'||_F / ||dW||_F`` over all its modules.

        As measured when it was coded; a bound where its entry says so.
        """
        return {name: entry.error for name, entry in self._index.members.items()}

    def summary(self) -> dict[str, Any]:
        """Numbers of the whole bank: bytes with everything counted, ratios, and the root mean square of the errors."""
        members = list(self._index.members.values())
        values, errors = sum(m.values for m in members), [m.error for m in members]
        size = self.bytes
        return {
            "adapters": len(members),
            "modules": len(self._index.modules),
            "base": self._index.base,
            "method": self._index.method,
            "coding": self._index.coding,
            "parameters": dict(self._index.parameters),
            "bytes": size,
            "basis_bytes": self._index.basis_bytes,
            "source_bytes": sum(m.source_bytes for m in members),
            "ratio": 4 * values / size if size else 0.0,
            "ratio_to_sources": sum(m.source_bytes for m in members) / size if size else 0.0,
            "error": (sum(e * e for e in errors) / len(errors)) ** 0.5 if errors else 0.0,
            "largest_error": max(errors, default=0.0),
            "directions": self.directions(),
        }

    @property
    def bases(self) -> Sequence[Basis]:
        """Decoded shared directions of each module, in the order of ``index.modules``; read on first use."""
        if self._bases is None:
            basis = self._index.basis
            self._bases = decode_bases(self._index, self._read(store.basis_file(basis), basis)["payload"])
        return self._bases

    def directions(self) -> dict[str, tuple[int, int]]:
        """Shared directions ``(k_in, k_out)`` of each module."""
        return {m.name: (b.side_in.k, b.side_out.k) for m, b in zip(self._index.modules, self.bases, strict=True)}

    def basis(
        self, k: int | None = None, *, members: int | None = None, random_directions: int = 0, seed: int = 0
    ) -> BankBasis:
        """An orthonormal basis of every module, to train in and to serve from.

        Where fewer directions are stored than wanted, the missing ones are derived from the members as the bank holds
        them: the same bank gives the same basis. The last few are kept in memory, none is written.

        Args:
            k: Directions a side, by default 32; 0 gives empty bases. Narrow layers have as many as they are wide, and
                where the bank kept fewer of its members than their ranks say, there are fewer.
            members: Derive from the first so many members only, as a basis from before later ones came. Trained
                tasks don't count: no direction is derived from them.
            random_directions: So many seeded random directions a side after the bank's.
            seed: Of the random directions.

        Raises:
            BankError: If the members' ranks, or the directions of a plain bank, can't make ``k``, or a layer has no
                room for the random directions.
        """
        used = tuple(self._index.members[name].sha256 for name in basis_members(self)[:members])
        key = (self._index.basis, k, members, used, random_directions, seed)
        if key not in self._shared:
            if random_directions:
                made = with_random(self.basis(k, members=members), random_directions, seed)
            else:
                made = shared_basis(self, k, members=members)
            while len(self._shared) >= KEPT_BASES:
                del self._shared[next(iter(self._shared))]
            self._shared[key] = made
        return self._shared[key]

    # --- members back -----------------------------------------------------------------------------------------------

    def reconstruct(self, name: str) -> LoraAdapter:
        """A member as an ordinary LoRA adapter in memory, with the modules, ranks, scales and task head it came with.

        Raises:
            UnknownNameError: If there is no such member.
            BankError: If its file is damaged.
        """
        entry = self[name]
        tensors = self._read(store.member_file(entry.sha256), entry.sha256)
        if entry.task is not None:
            task = entry.task
            basis = self.basis(task.k, members=task.members, random_directions=task.random, seed=task.seed)
            return restore_task(self._index, basis, name, tensors)
        return restore(self._index, self.bases, name, tensors)

    def export(self, name: str, directory: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Write a member as an ordinary PEFT directory; see ``LoraAdapter.save``."""
        self.reconstruct(name).save(directory, dtype=dtype)

    def verify(
        self, originals: Mapping[str, Source] | Iterable[Source], *, allow_pickle: bool = False
    ) -> dict[str, float]:
        """Measure members against their originals again, before those are deleted.

        Args:
            originals: The adapters, by member name or in the forms of :meth:`fit`.
            allow_pickle: See ``LoraAdapter.load``.

        Returns:
            Relative error of each update.

        Raises:
            UnknownNameError: If one is no member.
            AdapterError: If an original has other modules or another task head than its member.
        """
        errors, opener = {}, TaskOpener(self)
        for name, source in named_sources(originals):
            original = source if isinstance(source, LoraAdapter) else opener(name, source, allow_pickle=allow_pickle)
            errors[name or original.name] = relative_error(original, self.reconstruct(name or original.name))
        return errors

    # --- changes ----------------------------------------------------------------------------------------------------

    def add(
        self,
        adapters: Sources | Source,
        *,
        max_error: float | None = None,
        base: str | None = None,
        skip_bad: bool = False,
        allow_pickle: bool = False,
        progress: Progress | None = None,
    ) -> list[str]:
        """Code adapters on the basis there is, like the fit: at its slope, or keeping its promised error.

        A task that was trained in this bank joins without loss, at 32 bits a coefficient, where it is only
        coefficients on directions that the bank can derive; with ``max_error`` its coefficients are coded, in a
        fraction of those bytes, where that is possible. With anything of its own beside them (free pair, own
        components, directions of its gradient or of the base) a task is coded like any adapter.

        Args:
            adapters: One adapter or several, as in :meth:`fit`; also directories of tasks trained in this bank.
            max_error: Promise of these adapters' relative errors instead of the bank's; it isn't remembered when the
                bank is fitted again.
            base: As in :meth:`fit`.
            skip_bad: As in :meth:`fit`.
            allow_pickle: As in :meth:`fit`.
            progress: Called with ``(stage, done, total)``.

        Returns:
            Names of the new members.

        Raises:
            AdapterError: If an adapter can't be used, has a module that the bank lacks, or its name is taken.
            BankError: If a task was trained on another basis than this bank's, or ``max_error`` can't be kept, as in
                a bank of plain values.
        """
        if max_error is not None:
            check_positive("max_error", max_error)
            if self._index.coding != "predictive":
                raise BankError(f"max_error={max_error:g}: this bank holds {self._index.coding} values; leave it out")
        opener = TaskOpener(self)
        family = self._beside(
            adapters, base=base, skip_bad=skip_bad, allow_pickle=allow_pickle, opener=opener, progress=progress
        )
        lacking = set(family.modules) - {m.name for m in self._index.modules}
        if lacking:
            raise BankError(
                f"the bank has no basis for {min(lacking)}"
                + (f" and {len(lacking) - 1} more modules" if len(lacking) > 1 else "")
                + "; use absorb, which fits again"
            )
        configs = MemberConfigs(self._index.configs)
        ordinary = self._coder(family, configs, max_error)
        tasks = TaskCoder(
            family, self._index.modules, configs, slope=self._index.slope, max_error=max_error, tasks=opener.tasks
        )
        members = dict(self._index.members)
        for i, adapter in enumerate(family.adapters):
            coder = tasks if adapter in opener.tasks else ordinary
            members[adapter.name] = self._stage(coder.code(i))
            if progress:
                progress("coding adapters", i + 1, len(family.adapters))
        self._index = replace(self._index, members=members, configs=configs.all(), base=self._index.base or family.base)
        self.refused = family.refused
        return family.names()

    def remove(self, name: str) -> list[str]:
        """Drop a member; the stored basis stays as it is.

        Trained tasks whose basis was derived from it, too, are coded again first, as ordinary members with an error of
        1e-6, or a tenth more than they had: they lose nothing to speak of, but take more bytes. Compact the bank to
        keep tasks small for ever.

        Returns:
            Names of those tasks.

        Raises:
            UnknownNameError: If there is no such member.
            BankError: If a task that needs it can't be kept as exactly, in a bank of plain values.
        """
        _ = self[name]
        order = basis_members(self)
        place = order.index(name) if name in order else len(order)
        needing = [n for n, m in self._index.members.items() if m.task is not None and m.task.members > place]
        members, configs = dict(self._index.members), MemberConfigs(self._index.configs)
        if needing:
            members |= self._recoded(needing, configs, name)
        del members[name]
        self._index = replace(self._index, members=members, configs=configs.all())
        return needing

    def rename(self, old: str, new: str) -> None:
        """Give a member another name.

        Raises:
            UnknownNameError: If there is no member ``old``.
            BankError: If ``new`` is taken.
        """
        _ = self[old]
        check_name(new)
        if any(n.casefold() == new.casefold() for n in self.names if n != old):
            raise BankError(
                f"the bank has a member {new!r} already; names must differ by more than upper and lower case"
            )
        self._index = replace(
            self._index, members={(new if n == old else n): m for n, m in self._index.members.items()}
        )

    def absorb(
        self,
        adapters: Sources | Source,
        *,
        originals: Mapping[str, Source] | None = None,
        base: str | None = None,
        skip_bad: bool = False,
        allow_pickle: bool = False,
        progress: Progress | None = None,
    ) -> dict[str, float]:
        """Fit again, with new adapters in it: the basis learns from them.

        Old members are taken as the bank holds them, so their errors add up; the sum is what is reported of them, as
        a bound. With their originals at hand they're taken from there. Tasks trained in this bank are multiplied out:
        the new basis is another one, on which their coefficients mean nothing.

        Args:
            adapters: One adapter or several, as in :meth:`add`.
            originals: Originals of old members, by name.
            base: As in :meth:`fit`.
            skip_bad: As in :meth:`fit`.
            allow_pickle: As in :meth:`fit`.
            progress: Called with ``(stage, done, total)``.

        Returns:
            Error of every member, old and new; at most that for old ones.
        """
        given = dict(originals or {})
        for name in given:
            _ = self[name]
        old: dict[str, Source] = {name: given.get(name) or self.reconstruct(name) for name in self.names}
        family, opener = Family(base=self._index.base), TaskOpener(self)
        if old:
            family = open_family(old, base=self._index.base, allow_pickle=allow_pickle, opener=opener)
        loose = {name: self[name] for name in self.names if name not in given}
        family = open_family(
            _several(adapters), base=base, skip_bad=skip_bad, allow_pickle=allow_pickle, into=family, opener=opener,
            progress=progress,
        )  # fmt: skip
        self._become(Bank._fitted(family, self._settings(), None, progress), loose)
        return self.errors()

    def compact(self, k: int, *, progress: Progress | None = None) -> None:
        """Fit again with exactly ``k`` stored directions a side, so that training and serving find them in the bank.

        Members are taken as the bank holds them; errors become bounds as in :meth:`absorb`.
        """
        settings = self._settings()
        # a default promise is no argument that is stored; beside a k it has to be said
        settings = replace(settings, k=k, max_error=settings.error)
        family = open_family({name: self.reconstruct(name) for name in self.names}, base=self._index.base)
        self._become(Bank._fitted(family, settings, None, progress), dict(self._index.members))

    @classmethod
    def combine(
        cls,
        first: "Bank",
        second: "Bank",
        *,
        ratio: float | None = None,
        budget: int | str | None = None,
        max_error: float | None = None,
        k: int | None = None,
        progress: Progress | None = None,
    ) -> "Bank":
        """Fit one bank on the members of two, taken as the banks hold them.

        Args:
            first: A bank.
            second: Another one, of the same base model, with no name in common.
            ratio: As in :meth:`fit`; without any target the arguments of ``first`` are taken.
            budget: As in :meth:`fit`.
            max_error: As in :meth:`fit`.
            k: As in :meth:`fit`.
            progress: Called with ``(stage, done, total)``.

        Raises:
            AdapterError: If both have a member of one name, or they don't belong together.
        """
        family = Family()
        for bank in (first, second):
            family = open_family([bank.reconstruct(name) for name in bank.names], into=family)
        settings = first._settings()
        if any(given is not None for given in (ratio, budget, max_error, k)):
            size = None if budget is None else parse_bytes(budget)
            settings = FitSettings(ratio=ratio, budget=size, max_error=max_error, k=k)
        bank = cls._fitted(family, settings, None, progress)
        bank._bound({**first._index.members, **second._index.members})
        return bank

    # --- inside -----------------------------------------------------------------------------------------------------

    def _settings(self) -> FitSettings:
        try:
            return FitSettings(**dict(self._index.parameters))
        except TypeError as error:
            raise BankError(f"the bank is damaged: its parameters are none of a fit: {error}") from error

    def _become(self, fitted: "Bank", coded_before: Mapping[str, MemberEntry]) -> None:
        fitted._bound(coded_before)
        for path in fitted._staging.path.iterdir():
            shutil.move(path, self._staging.path / path.name)
        self._index, self._bases, self.refused = fitted._index, None, fitted.refused

    def _bound(self, coded_before: Mapping[str, MemberEntry]) -> None:
        """Members that were coded from codes: what they had lost before counts too, by the triangle inequality."""
        members = {}
        for name, entry in self._index.members.items():
            before = coded_before.get(name)
            if before is None:
                members[name] = entry
                continue
            members[name] = _after(before, entry)
        self._index = replace(self._index, members=members)

    def _stage(self, coded: Coded) -> MemberEntry:
        """Put a member's file where the next save finds it."""
        name = store.member_file(coded.entry.sha256)
        store.write_file(self._staging.path, name, coded.data, coded.entry.sha256, durable=False)
        return coded.entry

    def _recoded(self, names: list[str], configs: MemberConfigs, leaving: str) -> dict[str, MemberEntry]:
        """Trained tasks as ordinary members because ``leaving`` goes: all but as good as they were."""
        family = open_family([self.reconstruct(name) for name in names], base=self._index.base)
        entries = {}
        for i, name in enumerate(names):
            before = self[name]
            coded = self._coder(family, configs, max(RECODED_ERROR, RECODED_SHARE * before.error)).code(i)
            if coded.entry.error > max(MOST_RECODED_ERROR, RECODED_SHARE * before.error):
                raise BankError(
                    f"the trained task {name!r} stands on directions that come from {leaving!r}, and without it this "
                    f"{self._index.coding} bank could hold the task only with an error of {coded.entry.error:.2g}; "
                    f"remove {name!r} first, or compact the bank"
                )
            entries[name] = _after(before, self._stage(coded))
        return entries

    def _beside(self, adapters: Sources | Source, **options: Any) -> Family:
        """Open new adapters and compare them with what the bank knows."""
        modules = {m.name: m for m in self._index.modules}
        family = Family(base=self._index.base, modules=modules, taken=frozenset(self.names))
        return open_family(_several(adapters), into=family, **options)

    def _coder(self, family: Family, configs: MemberConfigs, max_error: float | None = None) -> MemberCoder:
        bases: Any = self.bases
        settings = self._settings()
        if self._index.coding != "predictive":
            return PlainCoder(family, self._index.modules, configs, bases=bases, settings=settings)
        return PredictiveCoder(
            family, self._index.modules, configs, bases=bases, slope=self._index.slope,
            max_error=max_error or settings.error,
        )  # fmt: skip

    def _find(self, name: str) -> Path:
        return (self._staging.path if self._staging.holds(name) else self._directory) / name

    def _read(self, name: str, sha256: str) -> dict[str, Tensor]:
        tensors = store.read_file(self._find(name).parent, name, sha256)
        if "payload" not in tensors:
            raise BankError(f"{name} is damaged: it holds no payload")
        return tensors


def _after(before: MemberEntry, entry: MemberEntry) -> MemberEntry:
    """A member that was coded from codes: what it had lost before counts too, by the triangle inequality."""
    # the second error is relative to the decoded update, whose norm is at most 1 + error of the original's
    error = before.error + entry.error * (1 + before.error)
    return replace(
        entry, error=float(f"{error:.6g}"), bound=before.error > 0, source=before.source,
        source_bytes=before.source_bytes,
    )  # fmt: skip


def _several(adapters: Sources | Source) -> Sources:
    return [adapters] if isinstance(adapters, (str, Path, LoraAdapter)) else adapters


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none at all"
