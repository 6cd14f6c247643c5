"""One model, many sparse adapters, one at a time: a switch overwrites a few values, and nothing drifts."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from adapterbank.adapters.names import check_name
from adapterbank.adapters.peft_config import CONFIG_FILE
from adapterbank.errors import AdapterError, UnknownNameError
from adapterbank.shira.delta import SparseDelta, changed, gathered

Source = SparseDelta | str | Path


class Switcher:
    """Fuses one of several sparse adapters at a time into a model's weights, with its task head where it has one.

    Base values are saved once for each adapter and written back as they were, so the base comes back bit for bit after
    any sequence of switches. Adapters are opened when they're first needed.

    Args:
        model: The base model, on any device. Nobody else may change the weights that adapters change.
        adapters: By name: adapters, directories, files or hub ids; or a directory of adapters' directories.
        memory: Bytes that opened adapters may take together; the one used longest ago goes first, and is read again
            when it is needed. By default there is no limit. Adapters given as objects stay.
        heads: Off: weights only.
        check: Compare each adapter's fingerprint of its base.

    Raises:
        AdapterError: If a name can't name an adapter, or the directory holds none.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: Mapping[str, Source] | str | Path,
        *,
        memory: int | None = None,
        heads: bool = True,
        check: bool = True,
    ) -> None:
        self.model, self.memory, self.heads, self.check = model, memory, heads, check
        self.active: str | None = None
        """Name of the adapter that is in the weights; none: they are the base model's."""
        self._sources: dict[str, Source] = {}
        self._ready: OrderedDict[str, _Ready] = OrderedDict()
        self._coming: dict[str, Future[SparseDelta]] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="adapterbank-prefetch")
        self._free = threading.Condition()
        self._line: list[object] = []
        """Who waits, the first in front: a stream of readers must not keep a writer out."""
        self._users: list[int] = []
        """Threads inside :meth:`use`."""
        for name, source in (_in(adapters) if isinstance(adapters, (str, Path)) else adapters).items():
            self.add(name, source)

    @property
    def names(self) -> list[str]:
        """Of all adapters, in the order in which they were added."""
        return list(self._sources)

    def add(self, name: str, source: Source) -> None:
        """Add an adapter; it is opened when it is needed.

        Raises:
            AdapterError: If the name is taken, or can't name an adapter.
        """
        with self._free:
            if check_name(name) in self._sources:
                raise AdapterError(f"there is an adapter {name!r} already; remove it first")
            self._sources[name] = source

    def remove(self, name: str) -> None:
        """Forget an adapter; if it is active, the base model comes back first.

        Raises:
            UnknownNameError: If there is none of that name.
        """
        with self._turn(lambda: not self._users, "remove it"):
            self._known(name)
            if self.active == name:
                self._take_out()
            self._ready.pop(name, None)
            self._coming.pop(name, None)
            del self._sources[name]

    def prefetch(self, name: str) -> None:
        """Begin to read an adapter in the background, unless it is there.

        Raises:
            UnknownNameError: If there is none of that name.
        """
        with self._free:
            self._known(name)
            source = self._sources[name]
            if name not in self._ready and name not in self._coming and not isinstance(source, SparseDelta):
                self._coming[name] = self._reader.submit(SparseDelta.load, source, name=name, model=self.model)

    # --- switching --------------------------------------------------------------------------------------------------

    def switch(self, name: str, *, alpha: float = 1.0) -> None:
        """Put an adapter into the weights, in the place of the one that is there; waits for those inside :meth:`use`.

        Args:
            name: Which.
            alpha: Its strength; a task head has none.

        Raises:
            UnknownNameError: If there is none of that name.
            AdapterError: If it can't be read or doesn't fit the model; the weights are then as they were.
        """
        delta = self._read(name)
        with self._turn(lambda: not self._users, f"switch to {name!r}"):
            self._put_in(name, alpha, delta)

    def restore(self) -> None:
        """Bring back the base model; waits for those inside :meth:`use`."""
        with self._turn(lambda: not self._users, "restore the base"):
            self._take_out()

    @contextmanager
    def use(self, name: str, *, alpha: float = 1.0) -> Iterator[None]:
        """Hold an adapter in the weights: no other thread switches until the block is left.

        Any number of threads may use one adapter at a time; those that want another wait, in the order in which they
        came. The adapter stays in the weights afterwards.

        Raises:
            UnknownNameError: If there is none of that name.
            AdapterError: As :meth:`switch`; or inside a block of another adapter.
        """
        me = threading.get_ident()
        if not self._joined(me, name, alpha):
            delta = self._read(name)
            with self._turn(lambda: not self._users or self._is_in(name, alpha), f"use {name!r}"):
                self._put_in(name, alpha, delta)
                self._users.append(me)
        try:
            yield
        finally:
            with self._free:
                self._users.remove(me)
                self._free.notify_all()

    def _joined(self, me: int, name: str, alpha: float) -> bool:
        """Whether this thread is inside a block of the same adapter, and so inside one more: it needn't wait."""
        with self._free:
            if me not in self._users or not self._is_in(name, alpha):
                return False
            self._users.append(me)
            return True

    @contextmanager
    def _turn(self, free: Callable[[], bool], purpose: str) -> Iterator[None]:
        """Wait in line until something may be done, and keep everybody else out meanwhile."""
        me = object()
        with self._free:
            if threading.get_ident() in self._users:
                raise AdapterError(
                    f"this thread is inside use({self.active!r}) and would wait for itself to {purpose}; leave the "
                    "block first"
                )
            self._line.append(me)
            try:
                while self._line[0] is not me or not free():
                    self._free.wait()
                yield
            finally:
                self._line.remove(me)
                self._free.notify_all()

    def _is_in(self, name: str, alpha: float) -> bool:
        return self.active == name and self._ready[name].alpha == alpha

    def _known(self, name: str) -> None:
        if name not in self._sources:
            raise UnknownNameError(f"there is no adapter {name!r}; there are {', '.join(self._sources) or 'none'}")

    # --- the weights ------------------------------------------------------------------------------------------------

    def _read(self, name: str) -> SparseDelta | None:
        """The adapter, read while others go on; none if it is in memory."""
        with self._free:
            self._known(name)
            if name in self._ready:
                return None
            found = self._coming.pop(name, None) or self._sources[name]
        return self._opened(name, found)

    def _opened(self, name: str, found: "Source | Future[SparseDelta]") -> SparseDelta:
        if isinstance(found, Future):
            return found.result()
        return found if isinstance(found, SparseDelta) else SparseDelta.load(found, name=name, model=self.model)

    @torch.no_grad()
    def _put_in(self, name: str, alpha: float, delta: SparseDelta | None) -> None:
        self._known(name)  # somebody may have removed it
        if self._is_in(name, alpha):
            return
        before = self.active
        strength = None if before is None else self._ready[before].alpha
        self._take_out()
        if name not in self._ready:
            try:
                if delta is None:  # it was in memory, and has made room since
                    delta = self._opened(name, self._sources[name])
                self._ready[name] = _Ready.of(delta, self.model, heads=self.heads, check=self.check)
            except BaseException:  # of whatever kind: the one that was there comes back
                if before is not None and strength is not None:
                    self._put_in(before, strength, None)
                raise
        ready = self._ready[name]
        self._ready.move_to_end(name)
        self.active = name  # before the first write: restoring is right after any number of them
        ready.apply_(alpha)
        self._make_room()

    @torch.no_grad()
    def _take_out(self) -> None:
        if self.active is not None:
            self._ready[self.active].restore_()
            self.active = None

    def _make_room(self) -> None:
        if self.memory is None:
            return
        # the active one is the last
        held = [n for n in self._ready if n != self.active and not isinstance(self._sources[n], SparseDelta)]
        while held and sum(ready.bytes for ready in self._ready.values()) > self.memory:
            del self._ready[held.pop(0)]


@dataclass(kw_only=True, eq=False)
class _Part:
    """One parameter of an adapter, on the parameter's device."""

    weight: Tensor
    index: Tensor
    """int64: what scatter_ takes."""
    values: Tensor
    base: Tensor
    new: Tensor | None = None
    """Base and values together, at full strength."""

    def follow(self) -> None:
        """Go where the model has gone: to another device, or another type, in which its base values are these."""
        device, dtype = self.weight.device, self.weight.dtype
        if self.base.device != device or self.base.dtype != dtype:
            self.index, self.values = self.index.to(device), self.values.to(device)
            self.base, self.new = self.base.to(device, dtype), None

    def at(self, alpha: float) -> Tensor:
        """What the weight holds with the adapter."""
        if alpha != 1:
            return changed(self.base, self.values, alpha)
        if self.new is None:
            self.new = changed(self.base, self.values)
        return self.new

    def put_(self, values: Tensor) -> None:
        """Overwrite."""
        self.weight.data.view(-1).scatter_(0, self.index, values)


@dataclass(kw_only=True, eq=False)
class _Head:
    """A tensor that is exchanged as a whole."""

    place: Tensor
    base: Tensor
    new: Tensor


@dataclass(kw_only=True, eq=False)
class _Ready:
    """An adapter with everything that a switch needs."""

    parts: list[_Part]
    heads: list[_Head]
    alpha: float | None = None
    """Strength at which it is in the weights; none while it isn't, or not all of it: a write may be cut off."""

    @classmethod
    def of(cls, delta: SparseDelta, model: nn.Module, *, heads: bool, check: bool) -> "_Ready":
        """Of a model whose weights are the base model's."""
        weights, places = delta.weights_in(model), delta.heads_in(model) if heads else {}
        base = {name: gathered(weights[name], update.positions) for name, update in delta.updates.items()}
        if check:
            delta.check_base(base)
        parts = [
            _Part(
                weight=weights[name],
                index=update.positions.to(weights[name].device, torch.int64),
                values=update.values.to(weights[name].device),
                base=base[name],
            )
            for name, update in delta.updates.items()
        ]
        return cls(
            parts=parts,
            heads=[_Head(place=p, base=p.detach().clone(), new=delta.extras[name]) for name, p in places.items()],
        )

    def apply_(self, alpha: float) -> None:
        """Write the adapter into weights that are the base model's."""
        for part in self.parts:
            part.follow()
        # what takes memory comes before the first write
        news = [part.at(alpha) for part in self.parts]
        for part, new in zip(self.parts, news, strict=True):
            part.put_(new)
        for head in self.heads:
            head.place.data.copy_(head.new)
        self.alpha = alpha

    def restore_(self) -> None:
        """Take it out again."""
        self.alpha = None
        for part in self.parts:
            part.follow()
            part.put_(part.base)
        for head in self.heads:
            head.place.data.copy_(head.base)

    @property
    def bytes(self) -> int:
        """In memory."""
        tensors = [t for p in self.parts for t in (p.index, p.values, p.base, p.new) if t is not None]
        tensors += [tensor for head in self.heads for tensor in (head.base, head.new)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _in(directory: str | Path) -> dict[str, Source]:
    # not what begins with a dot: an adapter that is being written, or wasn't written to the end
    configs = sorted(Path(directory).glob(f"[!.]*/{CONFIG_FILE}"))
    found: dict[str, Source] = {path.parent.name: path.parent for path in configs}
    if not found:
        raise AdapterError(f"{directory} holds no directories of adapters; give a mapping of names to adapters")
    return found
