"""The members that an engine can serve: read when they're named, kept as long as there is room."""

import threading
from collections import OrderedDict

from adapterbank.bank import Bank
from adapterbank.errors import BankError, UnknownNameError
from adapterbank.runtime.members import Member, Splitter
from adapterbank.runtime.shelf import Shelf
from adapterbank.runtime.sparse import SparseMember

Served = Member | SparseMember


class MemberStore:
    """Members of a bank, and such as were added beside it.

    Args:
        bank: None: there are only those that are added.
        splitter: Makes members of the bank's adapters.
        memory: Bytes that the bank's members may take; the one used longest ago goes first. None: no limit.
        shelf: Where they're kept in the form in which they're served; none: they're read from the bank again.

    Raises:
        BankError: If ``memory`` is negative.
    """

    def __init__(self, bank: Bank | None, splitter: Splitter, *, memory: int | None, shelf: Shelf | None) -> None:
        if memory is not None and memory < 0:
            raise BankError(f"memory={memory} is no number of bytes; give 0 or more, or none for no limit")
        self.bank, self.splitter, self.memory, self.shelf = bank, splitter, memory, shelf
        self._added: dict[str, Served] = {}
        self._read: OrderedDict[str, Member] = OrderedDict()
        """Members out of the bank by the hash of their file, the one used last at the end."""
        self._read_bytes = 0
        self._busy = threading.RLock()  # members are read ahead in other threads

    @property
    def names(self) -> list[str]:
        """The bank's, then the added ones."""
        return [*(self.bank.names if self.bank else ()), *self._added]

    @property
    def held(self) -> list[Served]:
        """What is in memory."""
        return [*self._read.values(), *self._added.values()]

    def add(self, name: str, member: Served) -> None:
        """Add one that isn't in the bank.

        Raises:
            BankError: If the name is taken.
        """
        with self._busy:
            if name in self.names:
                raise BankError(f"there is a member {name!r} already; remove it, or give another name")
            self._added[name] = member

    def remove(self, name: str) -> None:
        """Forget one that was added; one of the bank leaves the memory.

        Raises:
            UnknownNameError: If there is none.
        """
        with self._busy:
            if name in self._added:
                del self._added[name]
            elif (digest := self._hash(name)) in self._read:
                self._drop(digest)

    def __getitem__(self, name: str) -> Served:
        """A member, read if need be.

        Raises:
            UnknownNameError: If there is none.
            BankError: If its file is damaged.
        """
        with self._busy:
            if name in self._added:
                return self._added[name]
            digest = self._hash(name)
            if digest in self._read:
                self._read.move_to_end(digest)
                return self._read[digest]
            member = self._read[digest] = self._opened(name, digest)
            self._read_bytes += member.bytes
            while self.memory is not None and self._read_bytes > self.memory and len(self._read) > 1:
                self._drop(next(iter(self._read)))
            return member

    def _opened(self, name: str, digest: str) -> Member:
        if self.shelf is not None and (found := self.shelf.get(digest)):
            return found
        assert self.bank is not None  # it has the name
        member = self.splitter.split(self.bank.reconstruct(name))
        return member if self.shelf is None else self.shelf.put(digest, member)

    def _hash(self, name: str) -> str:
        """Of a member's file: the bank may have another of this name by now."""
        if self.bank is None or name not in self.bank:
            raise UnknownNameError(f"there is no member {name!r}; there are {len(self.names)}")
        return self.bank[name].sha256

    def _drop(self, digest: str) -> None:
        self._read_bytes -= self._read.pop(digest).bytes
