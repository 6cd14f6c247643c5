"""One model, many sparse adapters, one at a time: a switch overwrites a few values, and nothing drifts."""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from adapterbank.adapters.names import check_name
from adapterbank.adapters.peft_config import CONFIG_FILE
from adapterbank.errors import AdapterError, UnknownNameError
from adapterbank.shira.delta import SparseDelta, gathered

Source = SparseDelta | str | Path


class Switcher:
    """Fuses one of several sparse adapters at a time into a model's weights.

    Base values are saved once for each adapter and written back as they were, so the base comes back bit for bit after
    any sequence of switches. Adapters are opened when they're first needed.

    Args:
        model: The base model, on any device. Nobody else may change the weights that adapters change.
        adapters: By name: adapters, directories, files or hub ids; or a directory of adapters' directories.
        memory: Bytes that opened adapters may take together; the one used longest ago goes first, and is read again
            when it is needed. By default there is no limit. Adapters given as objects stay.
        exact: Write back what was overwritten. Off: subtract and add, which drifts, and is no faster on a CPU.
        check: Compare each adapter's fingerprint of its base; without ``exact`` only that of the first.

    Raises:
        AdapterError: If a name can't name an adapter, or the directory holds none.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: Mapping[str, Source] | str | Path,
        *,
        memory: int | None = None,
        exact: bool = True,
        check: bool = True,
    ) -> None:
        self.model, self.memory, self.exact, self.check = model, memory, exact, check
        self.active: str | None = None
        """Name of the adapter that is in the weights; none: they are the base model's."""
        self._sources: dict[str, Source] = {}
        self._ready: OrderedDict[str, _Ready] = OrderedDict()
        self._coming: dict[str, Future[SparseDelta]] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="adapterbank-prefetch")
        self._free = threading.Condition()
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
        self._known(name)
        with self._alone():
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
        self._known(name)
        with self._free:
            source = self._sources[name]
            if name not in self._ready and name not in self._coming and not isinstance(source, SparseDelta):
                self._coming[name] = self._reader.submit(SparseDelta.load, source, name=name, model=self.model)

    # --- switching --------------------------------------------------------------------------------------------------

    def switch(self, name: str, *, alpha: float = 1.0) -> None:
        """Put an adapter into the weights, in the place of the one that is there; waits for those inside :meth:`use`.

        Args:
            name: Which.
            alpha: Its strength.

        Raises:
            UnknownNameError: If there is none of that name.
            AdapterError: If it can't be read or doesn't fit the model; the weights are then as they were.
        """
        self._known(name)
        with self._alone():
            self._put_in(name, alpha)

    def restore(self) -> None:
        """Bring back the base model; waits for those inside :meth:`use`."""
        with self._alone():
            self._take_out()

    @contextmanager
    def use(self, name: str, *, alpha: float = 1.0) -> Iterator[None]:
        """Hold an adapter in the weights: no other thread switches until the block is left.

        Any number of threads may use one adapter at a time; those that want another wait. The adapter stays in the
        weights afterwards.

        Raises:
            UnknownNameError: If there is none of that name.
            AdapterError: As :meth:`switch`; or inside a block of another adapter.
        """
        self._known(name)
        with self._free:
            while self._users and not self._is_in(name, alpha):
                self._refuse_inside(name)
                self._free.wait()
            if not self._is_in(name, alpha):
                self._put_in(name, alpha)
            self._users.append(threading.get_ident())
        try:
            yield
        finally:
            with self._free:
                self._users.remove(threading.get_ident())
                self._free.notify_all()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self._free:
            while self._users:
                self._refuse_inside("another")
                self._free.wait()
            yield
            self._free.notify_all()

    def _refuse_inside(self, wanted: str) -> None:
        if threading.get_ident() in self._users:
            raise AdapterError(f"this thread is inside use({self.active!r}) and would wait for itself for {wanted}")

    def _is_in(self, name: str, alpha: float) -> bool:
        return self.active == name and self._ready[name].alpha == alpha

    def _known(self, name: str) -> None:
        if name not in self._sources:
            raise UnknownNameError(f"there is no adapter {name!r}; there are {', '.join(self._sources) or 'none'}")

    # --- the weights ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _put_in(self, name: str, alpha: float) -> None:
        if self._is_in(name, alpha):
            return
        delta = None if name in self._ready else self._read(name)
        before = self.active
        self._take_out()
        if delta is not None:
            try:
                # with sums the base is no longer quite what it was
                check = self.check and (self.exact or not self._ready)
                self._ready[name] = _Ready.of(delta, self.model, check=check)
            except BaseException:  # of whatever kind: the one that was there comes back
                if before is not None:
                    self._put_in(before, self._ready[before].alpha)
                raise
        ready = self._ready[name]
        self._ready.move_to_end(name)
        self.active = name  # before the first write: restoring is right after any number of them
        ready.apply_(alpha, exact=self.exact)
        self._make_room()

    @torch.no_grad()
    def _take_out(self) -> None:
        if self.active is not None:
            self._ready[self.active].restore_(exact=self.exact)
            self.active = None

    def _read(self, name: str) -> SparseDelta:
        coming, source = self._coming.pop(name, None), self._sources[name]
        if coming is not None:
            return coming.result()
        return source if isinstance(source, SparseDelta) else SparseDelta.load(source, name=name, model=self.model)

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

    def to_device(self) -> None:
        """Follow a model that has moved."""
        device = self.weight.device
        if self.index.device != device:
            self.index, self.values, self.base = (t.to(device) for t in (self.index, self.values, self.base))
            self.new = None if self.new is None else self.new.to(device)

    def changed(self, alpha: float) -> Tensor:
        """What the weight holds with the adapter."""
        if alpha == 1:
            if self.new is None:
                self.new = self._sum(alpha)
            return self.new
        return self._sum(alpha)

    def _sum(self, alpha: float) -> Tensor:
        return (self.base.float() + alpha * self.values).to(self.weight.dtype)


@dataclass(kw_only=True, eq=False)
class _Ready:
    """An adapter with everything that a switch needs."""

    parts: list[_Part]
    alpha: float = field(default=1.0)

    @classmethod
    def of(cls, delta: SparseDelta, model: nn.Module, *, check: bool) -> "_Ready":
        """Of a model whose weights are the base model's."""
        weights = delta.weights_in(model)
        base = {name: gathered(weights[name], update.positions) for name, update in delta.updates.items()}
        if check:
            delta.check_base(base)
        parts = [
            _Part(
                weight=weights[name],
                index=update.positions.to(weights[name].device, torch.int64),
                values=update.values.to(weights[name].device, torch.float32),
                base=base[name],
            )
            for name, update in delta.updates.items()
        ]
        return cls(parts=parts)

    def apply_(self, alpha: float, *, exact: bool) -> None:
        """Write the adapter into weights that are the base model's."""
        self.alpha = alpha
        for part in self.parts:
            part.to_device()
        # what takes memory comes before the first write
        news = [p.changed(alpha) if exact else (alpha * p.values).to(p.weight.dtype) for p in self.parts]
        for part, new in zip(self.parts, news, strict=True):
            flat = part.weight.data.view(-1)
            if exact:
                flat.scatter_(0, part.index, new)
            else:
                flat.scatter_add_(0, part.index, new)

    def restore_(self, *, exact: bool) -> None:
        """Take it out again."""
        for part in self.parts:
            part.to_device()
            flat = part.weight.data.view(-1)
            if exact:
                flat.scatter_(0, part.index, part.base)
            else:
                flat.scatter_add_(0, part.index, (-self.alpha * part.values).to(flat.dtype))

    @property
    def bytes(self) -> int:
        """In memory."""
        tensors = [t for p in self.parts for t in (p.index, p.values, p.base, p.new) if t is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _in(directory: str | Path) -> dict[str, Source]:
    configs = sorted(Path(directory).glob(f"*/{CONFIG_FILE}"))
    found: dict[str, Source] = {path.parent.name: path.parent for path in configs}
    if not found:
        raise AdapterError(f"{directory} holds no directories of adapters; give a mapping of names to adapters")
    return found
