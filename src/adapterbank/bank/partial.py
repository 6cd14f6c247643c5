"""A fit in parts: sketches of disjoint sets of adapters, joined in any order, saved and sent between processes."""

from pathlib import Path
from typing import TypeAlias

import safetensors.torch
import torch
from safetensors import SafetensorError

from adapterbank.bank.family import Family, Progress
from adapterbank.bank.index import ModuleEntry
from adapterbank.errors import BankError, MissingFileError
from adapterbank.subspace.moments import SecondMoment
from adapterbank.subspace.product import input_rows, output_rows


class PartialFit:
    """Second moments of both sides of every module over some adapters: all that finding a basis needs.

    Merging is associative and commutative, and equals one fit over all adapters to float32 rounding where a layer is at
    most 4,096 wide; beyond, within the energy that the sketch counts as lost.
    """

    Pair: TypeAlias = tuple[SecondMoment, SecondMoment]

    def __init__(self) -> None:
        self.adapters: list[str] = []
        """Names of the adapters that went in."""
        self._moments: dict[str, PartialFit.Pair] = {}

    @classmethod
    def of(cls, family: Family, progress: Progress | None = None) -> "PartialFit":
        """Sketch a family."""
        made = cls()
        made.adapters = family.names()
        for done, name in enumerate(family.module_names(), start=1):
            made._moments[name] = cls.of_module(family, family.modules[name])
            if progress:
                progress("finding shared directions", done, len(family.modules))
        return made

    @staticmethod
    def of_module(family: Family, module: ModuleEntry, rows: int | None = None) -> "PartialFit.Pair":
        """Moments of one module, every adapter weighted by 1 over the norm of its whole update."""
        side_in = SecondMoment(module.d_in, expect_rows=rows)
        side_out = SecondMoment(module.d_out, expect_rows=rows)
        for i, adapter in enumerate(family.adapters):
            if module.name in adapter.modules:
                update, weight = family.update(i, module.name), family.weight(i) ** 0.5
                side_in.add(input_rows(update, weight))
                side_out.add(output_rows(update, weight))
        return side_in, side_out

    def module(self, module: ModuleEntry) -> "PartialFit.Pair":
        """Moments of one module.

        Raises:
            BankError: If the sketch has no such module or other shapes.
        """
        pair = self._moments.get(module.name)
        if pair is None or (pair[0].d, pair[1].d) != (module.d_in, module.d_out):
            found = "nothing" if pair is None else f"{pair[0].d} -> {pair[1].d}"
            raise BankError(f"the sketch has {found} for {module.name}, expected {module.d_in} -> {module.d_out}")
        return pair

    def merge(self, other: "PartialFit") -> None:
        """Add what ``other`` has seen.

        Raises:
            BankError: If an adapter is in both, or shapes differ.
        """
        both = {n.casefold() for n in self.adapters} & {n.casefold() for n in other.adapters}
        if both:
            raise BankError(f"adapter {min(both)!r} is in both sketches; it would count twice")
        for name, theirs in other._moments.items():
            if name in self._moments:  # before anything changes
                self.module(ModuleEntry(name=name, d_in=theirs[0].d, d_out=theirs[1].d))
        for name, theirs in other._moments.items():
            if name not in self._moments:
                self._moments[name] = (SecondMoment(theirs[0].d), SecondMoment(theirs[1].d))
            for mine, added in zip(self._moments[name], theirs, strict=True):
                mine.merge(added)
        self.adapters += other.adapters

    def save(self, path: str | Path) -> None:
        """Write the sketch as one safetensors file."""
        tensors = {
            f"{name}|{side}|{key}": value.contiguous()
            for name, pair in self._moments.items()
            for side, moment in zip(("in", "out"), pair, strict=True)
            for key, value in moment.state_dict().items()
        }
        tensors["adapters"] = torch.frombuffer(bytearray("\n".join(self.adapters).encode() or b"\n"), dtype=torch.uint8)
        safetensors.torch.save_file(tensors, str(path))

    @classmethod
    def load(cls, path: str | Path) -> "PartialFit":
        """Read a sketch.

        Raises:
            MissingFileError: If there is no such file.
            BankError: If it is none.
        """
        try:
            tensors = safetensors.torch.load(Path(path).read_bytes())
        except FileNotFoundError as error:
            raise MissingFileError(f"{path} does not exist; give a file that PartialFit.save wrote") from error
        except (SafetensorError, OSError) as error:
            raise BankError(f"{path} is no sketch: {error}") from error
        made = cls()
        states: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
        try:
            names = tensors.pop("adapters").numpy().tobytes().decode()
            for full, value in tensors.items():
                module, side, key = full.rsplit("|", 2)
                states.setdefault((module, side), {})[key] = value
            for module in {m for m, _ in states}:
                pair = [SecondMoment.from_state(states[module, side]) for side in ("in", "out")]
                made._moments[module] = (pair[0], pair[1])
        except (KeyError, ValueError, TypeError) as error:
            raise BankError(f"{path} is no sketch: {error}") from error
        made.adapters = names.split("\n") if names.strip() else []
        return made
