"""``AdapterEngine``: one model, thousands of members of a bank, any mix of them in one batch."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapterbank.adapters import LoraAdapter
from adapterbank.adapters.names import check_name, match_modules
from adapterbank.bank import Bank
from adapterbank.errors import BankError, UnknownNameError
from adapterbank.runtime.batch import rows_of
from adapterbank.runtime.heads import ServedHead, State
from adapterbank.runtime.layer import COMPUTE, ServedLayer
from adapterbank.runtime.members import LayerBasis, Member, Splitter, directions


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
    head_bytes: int
    private_work: float
    """Share of a token's products that go through remainders of its own member. Where it is large, serve from a copy of
    the bank after ``bank.compact(k)``, whose members have none."""


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
        bank: The bank or its directory.
        k: Shared directions a side; by default as many as the bank stores in any layer, at least 32. What they can't
            hold of a member is added by itself.
        bits: Of a value in memory: 16 (off by ``2**-16`` of a row's largest), 32, or 8.
        memory: Bytes that members may take; the one used longest ago goes first, and is read from the bank again when
            it is needed. By default there is no limit.
        crossover: Tokens a row from which a member's factors are built for the step; by default ``k r / (k - r)``.

    Raises:
        MissingFileError: If there is no bank.
        BankError: If the model lacks a layer of the bank, or has it in another size.
    """

    def __init__(
        self,
        model: nn.Module,
        bank: Bank | str | Path,
        *,
        k: int | None = None,
        bits: int = 16,
        memory: int | None = None,
        crossover: float | None = None,
    ) -> None:
        self.model, self.bank = model, bank if isinstance(bank, Bank) else Bank.load(Path(bank).expanduser())
        self.memory = memory
        layers = _layers_of(self.bank, model)
        basis = self.bank.basis(directions(self.bank) if k is None else k)
        bases = {layer: LayerBasis.of(basis.modules[module]) for module, layer in layers.items()}
        dtype = next((p.dtype for p in model.parameters() if p.dtype in COMPUTE), torch.float32)
        self._layers = {name: ServedLayer(model.get_submodule(name), bases[name], dtype, crossover) for name in bases}
        self._splitter = Splitter(bases, bits)
        self._heads: dict[str, ServedHead] = {}
        self._added: dict[str, Member] = {}
        """Members that are not in the bank."""
        self._read: OrderedDict[str, Member] = OrderedDict()
        """Members out of the bank by the hash of their file, the one used last at the end."""
        self._busy = threading.RLock()

    # --- members ------------------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Of all members: the bank's, then those that were added here."""
        return [*self.bank.names, *self._added]

    def add(self, adapter: LoraAdapter | str | Path, *, name: str | None = None) -> None:
        """Serve an adapter that is not in the bank, beside those that are; running contexts go on.

        Args:
            adapter: The adapter, its directory, file or hub id.
            name: By default its own.

        Raises:
            BankError: If the name is taken, or the adapter doesn't fit the bank's layers.
            AdapterError: If it can't be read.
        """
        loaded = adapter if isinstance(adapter, LoraAdapter) else LoraAdapter.load(adapter, name=name)
        name = check_name(name or loaded.name)
        if name in self.names:
            raise BankError(f"there is a member {name!r} already; remove it, or give another name")
        self._added[name] = self._splitter.split(loaded)

    def remove(self, name: str) -> None:
        """Forget a member that was added here; one of the bank goes with ``Bank.remove``, and here from memory.

        Raises:
            UnknownNameError: If there is none.
        """
        if name in self._added:
            del self._added[name]
        else:
            self._read.pop(self._hash(name), None)

    def load(
        self, names: Sequence[str] | None = None, *, progress: Callable[[str, int, int], None] | None = None
    ) -> None:
        """Read members into memory, so that no step waits for them; by default all of the bank.

        Raises:
            UnknownNameError: If there is no such member.
            BankError: If a file is damaged.
        """
        wanted = list(self.bank.names if names is None else names)
        for done, name in enumerate(wanted, start=1):
            self._member(name)
            if progress:
                progress("load members", done, len(wanted))

    def _member(self, name: str) -> Member:
        if name in self._added:
            return self._added[name]
        digest = self._hash(name)
        if digest not in self._read:
            self._read[digest] = self._splitter.split(self.bank.reconstruct(name))
            self._make_room(digest)
        self._read.move_to_end(digest)
        return self._read[digest]

    def _hash(self, name: str) -> str:
        """Of a member's file: the bank may have another of this name by now."""
        if name not in self.bank:
            raise UnknownNameError(f"there is no member {name!r}; the bank has {len(self.bank)}")
        return self.bank[name].sha256

    def _make_room(self, newest: str) -> None:
        if self.memory is not None:
            held = sum(member.bytes for member in self._read.values())
            for digest in list(self._read):
                if held <= self.memory or digest == newest:
                    return
                held -= self._read.pop(digest).bytes

    # --- batches ------------------------------------------------------------------------------------------------------

    @contextmanager
    def adapters(self, rows: Sequence[str | None]) -> Iterator[None]:
        """Inside the block, row ``i`` of every batch is served by member ``rows[i]``; ``None`` is the base model.

        One block at a time: another thread waits. That many rows at once need no more threads is what this is for.

        Args:
            rows: A name for each row. ``generate`` with beams and models that flatten tokens are understood.

        Raises:
            UnknownNameError: If there is no such member.
            BankError: If a file is damaged.
        """
        with self._busy:
            distinct = list(dict.fromkeys(name for name in rows if name is not None))
            members = [self._member(name) for name in distinct]
            which = [-1 if name is None else distinct.index(name) for name in rows]
            before = self._state()
            try:
                self._activate(members, which)
                yield
            finally:
                self._restore(before)

    @contextmanager
    def merged(self, name: str) -> Iterator[None]:
        """Inside the block, every row is served by one member, written into the weights: no cost per token.

        Afterwards the weights are the base model's, bit for bit: they are copied for the while.

        Raises:
            UnknownNameError: If there is no such member.
            BankError: If a weight is quantised, or a file is damaged.
        """
        with self._busy:
            member, before = self._member(name), self._state()
            layers = {place: self._layers[place] for place in member.layout.places}
            weights, heads = [layer.weight() for layer in layers.values()], self._head_states(member)
            saved = [weight.detach().clone() for weight in weights]
            try:
                self._activate([], [])
                for place, state in heads.items():
                    self._head(place).active = [(state, None)]
                with torch.no_grad():
                    for (place, layer), weight in zip(layers.items(), weights, strict=True):
                        weight += layer.dense(place, member).to(weight)
                yield
            finally:
                with torch.no_grad():
                    for weight, value in zip(weights, saved, strict=True):
                        weight.copy_(value)
                self._restore(before)

    def _activate(self, members: Sequence[Member], which: Sequence[int]) -> None:
        found = rows_of(members, which)
        for name, layer in self._layers.items():
            layer.activate(found.get(name))
        states = [self._head_states(member) for member in members]
        for name in {name for of in states for name in of}:
            self._head(name)
        for name, head in self._heads.items():
            head.activate([of.get(name) for of in states], which)

    def _head(self, name: str) -> ServedHead:
        if name not in self._heads:
            self._heads[name] = ServedHead(self.model.get_submodule(name))
        return self._heads[name]

    def _head_states(self, member: Member) -> dict[str, State]:
        """Tensors of a member's heads by the model's module that they belong to."""
        if not member.heads:
            return {}
        modules = dict(self.model.named_modules())
        found: dict[str, dict[str, Tensor]] = {}
        places = match_modules(member.heads, [name for name, _ in self.model.named_parameters()])
        for key, tensor in member.heads.items():
            if key not in places:
                raise BankError(f"member {member.name!r} brings {key}, which the model has not; load the base with it")
            module, _, last = places[key].rpartition(".")
            found.setdefault(module, {})[last] = tensor
        for module in found:
            if module in self._layers or module not in modules:
                raise BankError(f"member {member.name!r} trains {module} beside its update; restore and merge it")
        return dict(found)

    def _state(self) -> tuple[list[Any], list[Any]]:
        return [layer.active for layer in self._layers.values()], [head.active for head in self._heads.values()]

    def _restore(self, before: tuple[list[Any], list[Any]]) -> None:
        for layer, active in zip(self._layers.values(), before[0], strict=True):
            layer.active = active
        for i, head in enumerate(self._heads.values()):  # some may be new
            head.active = before[1][i] if i < len(before[1]) else []

    # --- what it is ---------------------------------------------------------------------------------------------------

    def report(self) -> Report:
        """Bytes of what is in memory, and how much of the work is private."""
        members = [*self._read.values(), *self._added.values()]
        places = [place for member in members for place in member.layout.places.values()]
        private = [part for member in members for part in member.private.values()]
        bases = [self._layers[place.layer].basis for place in places]
        common = sum(basis.V.numel() + basis.U.numel() for basis in bases)
        common += sum(place.r * (place.k_in + place.k_out) for place in places)
        own = sum(part.values for part in private)
        return Report(
            members=len(members),
            basis_bytes=sum(layer.bytes for layer in self._layers.values()),
            shared_bytes=sum(member.coefficients.bytes for member in members),
            private_bytes=sum(part.bytes for part in private),
            head_bytes=sum(head.nbytes for member in members for head in member.heads.values()),
            private_work=own / (common + own) if own else 0.0,
        )

    def close(self) -> None:
        """Leave the model as it was."""
        for layer in self._layers.values():
            layer.release()
        for head in self._heads.values():
            head.release()
        self._layers, self._heads = {}, {}


def _layers_of(bank: Bank, model: nn.Module) -> Mapping[str, str]:
    """The model's layer of each module of the bank.

    Raises:
        BankError: If there is none.
    """
    modules = [module.name for module in bank.index.modules]
    present = [name for name, layer in model.named_modules() if hasattr(layer, "weight")]
    found = match_modules(modules, present)
    for module in modules:
        if module not in found:
            raise BankError(f"the model has no layer {module}; is it the bank's base, {bank.index.base or 'unnamed'}?")
    return found
