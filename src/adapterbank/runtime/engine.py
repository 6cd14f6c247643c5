"""``AdapterEngine``: one model, thousands of members of a bank, any mix of them in one batch."""

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapterbank.adapters import LoraAdapter
from adapterbank.adapters.names import check_name, match_modules
from adapterbank.adapters.peft_config import peft_type
from adapterbank.adapters.peft_files import open_source
from adapterbank.bank import Bank
from adapterbank.errors import BankError
from adapterbank.runtime.bases import bases_of
from adapterbank.runtime.batch import rows_of
from adapterbank.runtime.heads import ServedHead, State
from adapterbank.runtime.layer import COMPUTE, ServedLayer
from adapterbank.runtime.members import Member, Splitter
from adapterbank.runtime.merging import written
from adapterbank.runtime.shelf import Shelf
from adapterbank.runtime.sparse import SparseLayer, SparseMember, groups_of
from adapterbank.runtime.store import MemberStore, Served
from adapterbank.shira import SparseDelta
from adapterbank.shira.delta import tensors_of
from adapterbank.shira.files import LAYOUTS

EXPERT = re.compile(r"(^|\.)experts\.")
"""Layers that a router sends tokens to: those of which row, they can't know."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What an engine holds."""

    members: int
    """Unpacked members in memory."""
    basis_bytes: int
    """Of the shared directions of all layers."""
    shared_bytes: int
    """Of the members' coefficients."""
    private_bytes: int
    """Of what the shared directions can't hold."""
    sparse_bytes: int
    """Of sparse adapters."""
    head_bytes: int
    private_work: float
    """Share of a token's products that go through remainders of its own member. Where it is large, serve from a bank of
    the same members that was fitted with ``k`` alone: its members have none, and larger errors."""


class AdapterEngine:
    """Serves a model with another adapter for every row of a batch.

    ::

        engine = AdapterEngine(model, "bank")
        with engine.adapters(["law", "news", None]):
            model.generate(**batch)  # three rows

    The model is called as usual. Its linear layers get a hook each and stay what they are: quantised layers,
    ``torch.compile`` and device maps go on working. A row without an adapter gives the base model's numbers.

    Args:
        model: Any ``nn.Module`` that has the bank's layers; its names may have other leading parts.
        bank: The bank or its directory; none: only sparse adapters are added.
        k: Shared directions a side; by default as many as the bank stores in any layer, at least 32. What they can't
            hold of a member is added by itself.
        bits: Of a value in memory: 16 (off by ``2**-16`` of a row's largest), 32, or 8.
        memory: Bytes that members may take; the one used longest ago goes first, and is read again when it is needed.
            By default there is no limit.
        cache: Directory where members are kept in the form in which they're served. They're mapped from there, now and
            by later engines, which is faster than decoding them again. By default there is none.
        crossover: Tokens a row from which a member's factors are built for the step; by default ``k r / (k - r)``.

    Raises:
        MissingFileError: If there is no bank.
        BankError: If the model lacks a layer of the bank, or has it in another size, or an option can't be.
    """

    def __init__(
        self,
        model: nn.Module,
        bank: Bank | str | Path | None = None,
        *,
        k: int | None = None,
        bits: int = 16,
        memory: int | None = None,
        cache: str | Path | None = None,
        crossover: float | None = None,
    ) -> None:
        self.model, self.bank = model, Bank.load(Path(bank).expanduser()) if isinstance(bank, (str, Path)) else bank
        bases, recipe = bases_of(self.bank, model, k)
        dtype = next((p.dtype for p in model.parameters() if p.dtype in COMPUTE), torch.float32)
        self._splitter = Splitter(bases, bits)
        shelf = None if cache is None else Shelf(cache, recipe, self._splitter)
        self._members = MemberStore(self.bank, self._splitter, memory=memory, shelf=shelf)
        self._layers = {name: ServedLayer(model.get_submodule(name), bases[name], dtype, crossover) for name in bases}
        self._sparse: dict[str, SparseLayer] = {}
        self._heads: dict[str, ServedHead] = {}
        self._busy = threading.RLock()
        self._blocks: list[object] = []
        """Those that have begun, the innermost at the end."""
        self._merged: str | None = None
        self._closed = False

    # --- members ------------------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Of all members: the bank's, then those that were added here."""
        return self._members.names

    def add(self, adapter: LoraAdapter | SparseDelta | str | Path, *, name: str | None = None) -> None:
        """Serve an adapter that is not in the bank, beside those that are; running contexts go on.

        Args:
            adapter: A LoRA or a sparse adapter, or its directory, file or hub id.
            name: By default its own.

        Raises:
            BankError: If the name is taken, or the adapter doesn't fit the bank's layers, or a sparse one the model's.
            AdapterError: If it can't be read, or a sparse one is of another base model.
        """
        loaded = _opened(adapter, name, self.model) if isinstance(adapter, (str, Path)) else adapter
        name = check_name(name or loaded.name)
        if name in self.names:
            raise BankError(f"there is a member {name!r} already; remove it, or give another name")
        if isinstance(loaded, SparseDelta):
            self._members.add(name, SparseMember.of(loaded, self.model))
        else:
            self._members.add(name, self._splitter.split(loaded))

    def remove(self, name: str) -> None:
        """Forget a member that was added here; one of the bank goes with ``Bank.remove``, and here from memory.

        Raises:
            UnknownNameError: If there is none.
        """
        self._members.remove(name)

    def load(
        self, names: Sequence[str] | None = None, *, progress: Callable[[str, int, int], None] | None = None
    ) -> None:
        """Read members into memory, so that no step waits for them; by default all of the bank.

        Raises:
            UnknownNameError: If there is no such member.
            BankError: If a file is damaged.
        """
        wanted = self.names if names is None else list(names)
        for done, name in enumerate(wanted, start=1):
            self._members[name]
            if progress:
                progress("load members", done, len(wanted))

    # --- batches ------------------------------------------------------------------------------------------------------

    @contextmanager
    def adapters(self, rows: Iterable[str | None]) -> Iterator[None]:
        """Inside the block, row ``i`` of every batch is served by member ``rows[i]``; ``None`` is the base model.

        One block at a time: another thread waits. That many rows at once need no more threads is what this is for. Of
        two blocks in one thread the inner one holds, and ends first.

        Args:
            rows: A name for each row. ``generate`` with beams and models that flatten tokens are understood.

        Raises:
            UnknownNameError: If there is no such member.
            BankError: If a file is damaged, a member changes experts of a mixture, one is merged, the engine is closed,
                or blocks overlap.
        """
        with self._block():
            rows = list(rows)
            distinct = list(dict.fromkeys(name for name in rows if name is not None))
            members = [self._members[name] for name in distinct]
            self._activate(members, [-1 if name is None else distinct.index(name) for name in rows])
            yield

    @contextmanager
    def merged(self, name: str) -> Iterator[None]:
        """Inside the block, every row is served by one member, written into the weights: no cost per token.

        Afterwards the weights are the base model's, bit for bit: what is overwritten is copied for the while.

        Raises:
            UnknownNameError: If there is no such member.
            BankError: If a weight is quantised, or is another layer's too, or as for :meth:`adapters`.
            AdapterError: If a sparse adapter's weight is.
        """
        with self._block():
            member = self._members[name]
            (heads,) = self._head_states([member])
            self._activate([], [])
            for place, state in heads.items():
                self._head(place).activate_for_all(state)
            with written(member, self.model, self._layers):
                self._merged = name
                try:
                    yield
                finally:
                    self._merged = None

    @contextmanager
    def _block(self) -> Iterator[None]:
        """Leave the hooks as they were.

        Raises:
            BankError: If the engine is closed, or a member merged, or another block began inside and hasn't ended.
        """
        with self._busy:
            if self._closed:
                raise BankError("the engine is closed; make another one")
            if self._merged is not None:
                raise BankError(f"member {self._merged!r} is in the weights; end its block first")
            before, this = self._state(), object()
            self._blocks.append(this)
            try:
                yield
            finally:
                if self._blocks[-1:] != [this]:
                    # a generator or a coroutine: nobody can tell whose rows the model has served since
                    self._blocks = []
                    self._restore([])
                    raise BankError("blocks of one thread overlap; end the one that began last first")
                self._blocks.pop()
                self._restore(before)

    def _activate(self, members: Sequence[Served], which: Sequence[int]) -> None:
        numbered = dict(enumerate(members))
        rows = rows_of({i: member for i, member in numbered.items() if isinstance(member, Member)}, which)
        groups = groups_of({i: member for i, member in numbered.items() if isinstance(member, SparseMember)}, which)
        if routed := next((name for name in (*rows, *groups) if EXPERT.search(name)), None):
            raise BankError(
                f"{routed} gets tokens of any rows, in any order; serve one member at a time, with merged()"
            )
        for name, layer in self._layers.items():
            layer.activate(rows.get(name))
        for name in groups.keys() - self._sparse.keys():
            self._sparse[name] = SparseLayer(self.model.get_submodule(name))
        for name, sparse in self._sparse.items():
            sparse.activate(groups.get(name, []), len(which))
        states = self._head_states(members)
        for name in {name for of in states for name in of}:
            self._head(name)
        for name, head in self._heads.items():
            head.activate([of.get(name) for of in states], which)

    def _head(self, name: str) -> ServedHead:
        if name not in self._heads:
            self._heads[name] = ServedHead(self.model.get_submodule(name))
        return self._heads[name]

    def _head_states(self, members: Sequence[Served]) -> list[dict[str, State]]:
        """Of each member, tensors of its heads by the model's module that they belong to."""
        keys = dict.fromkeys(key for member in members for key in member.heads)
        places = match_modules(keys, tensors_of(self.model)) if keys else {}
        states: list[dict[str, State]] = []
        for member in members:
            found: dict[str, dict[str, Tensor]] = {}
            for key, tensor in member.heads.items():
                if key not in places:
                    raise BankError(
                        f"member {member.name!r} brings {key}, which the model has not; load the base with "
                        "such a head, or restore and merge a member with trained biases"
                    )
                module, _, last = places[key].rpartition(".")
                found.setdefault(module, {})[last] = tensor
            for module in found:
                if module in self._layers or module in self._sparse:
                    raise BankError(f"member {member.name!r} trains {module} beside its update; restore and merge it")
            states.append(dict(found))
        return states

    def _hooked(self) -> list[ServedLayer | SparseLayer | ServedHead]:
        return [*self._layers.values(), *self._sparse.values(), *self._heads.values()]

    def _state(self) -> list[tuple[Any, Any]]:
        return [(hooked, hooked.active) for hooked in self._hooked()]

    def _restore(self, before: list[tuple[Any, Any]]) -> None:
        for hooked in self._hooked():
            hooked.active = None  # some are new
        for hooked, active in before:
            hooked.active = active

    # --- what it is ---------------------------------------------------------------------------------------------------

    def report(self) -> Report:
        """Bytes of what is in memory, and how much of the work is private."""
        held = self._members.held
        members = [member for member in held if isinstance(member, Member)]
        places = [place for member in members for place in member.layout.places.values()]
        private = [part for member in members for part in member.private.values()]
        bases = [self._layers[place.layer].basis for place in places]
        common = sum(basis.V.numel() + basis.U.numel() for basis in bases)
        common += sum(place.r * (place.k_in + place.k_out) for place in places)
        own = sum(part.values for part in private)
        head_bytes = sum(head.nbytes for member in held for head in member.heads.values())
        shared_bytes = sum(member.coefficients.bytes for member in members)
        private_bytes = sum(part.bytes for part in private)
        return Report(
            members=len(held),
            basis_bytes=sum(layer.bytes for layer in self._layers.values()),
            shared_bytes=shared_bytes,
            private_bytes=private_bytes,
            sparse_bytes=sum(member.bytes for member in held) - shared_bytes - private_bytes - head_bytes,
            head_bytes=head_bytes,
            private_work=own / (common + own) if own else 0.0,
        )

    def close(self) -> None:
        """Leave the model as it was."""
        with self._busy:
            for hooked in self._hooked():
                hooked.release()
            self._closed = True


def _opened(source: str | Path, name: str | None, model: nn.Module) -> LoraAdapter | SparseDelta:
    """Whatever kind of adapter it is."""
    _, config, _ = open_source(source, name=name, config=None, allow_pickle=False)
    if peft_type(config) in LAYOUTS:
        return SparseDelta.load(source, name=name, model=model)
    return LoraAdapter.load(source, name=name)
