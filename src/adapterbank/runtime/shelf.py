"""Members on disk in the form in which they are served: mapped into memory, not decoded again."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from adapterbank.adapters.disk import replace_file
from adapterbank.errors import BankError
from adapterbank.runtime.members import Member, Private, Splitter
from adapterbank.runtime.packing import Packed

FORMAT = 1


class Shelf:
    """A directory with a file for each member; what can't be read there is as good as missing.

    Several engines may use one directory, also of other banks: a file's name is a hash of the member, the basis that it
    is written in, and the bits.

    Args:
        directory: Made if need be.
        basis: Names the basis.
        splitter: That members come from.

    Raises:
        BankError: If the directory can't be made.
    """

    def __init__(self, directory: str | Path, basis: str, splitter: Splitter) -> None:
        self.directory, self.splitter = Path(directory).expanduser(), splitter
        self._recipe = json.dumps([FORMAT, basis, splitter.bits, sorted(splitter.bases)])
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BankError(f"{self.directory} can't be made: {error.strerror}; give cache= another place") from error

    def path(self, digest: str) -> Path:
        """Of a member's file.

        Args:
            digest: Hash of the member's file in the bank.
        """
        return self.directory / f"{hashlib.sha256(f'{self._recipe} {digest}'.encode()).hexdigest()[:32]}.safetensors"

    def get(self, digest: str) -> Member | None:
        """A member whose tensors are pages of its file; none if it isn't there."""
        try:
            with safe_open(self.path(digest), "pt") as file:
                about = json.loads(file.metadata()["member"])
                names = file.keys()  # the handle is no mapping, and can't be gone through itself
                tensors = {name: file.get_tensor(name) for name in names}
            layout = self.splitter.layout(about["ranks"])
            member = Member(
                name=about["name"],
                layout=layout,
                coefficients=_packed(tensors, "coefficients"),
                private={
                    layer: Private(A=_there(tensors, f"{layer}.A"), B=_there(tensors, f"{layer}.B"))
                    for layer in about["private"]
                },
                heads={name: tensors[f"head.{name}"] for name in about["heads"]},
            )
        except (OSError, SafetensorError, ValueError, LookupError, TypeError):
            return None
        return member if member.coefficients.codes.numel() == layout.values else None

    def put(self, digest: str, member: Member) -> Member:
        """Write a member; returns it out of its file.

        Raises:
            BankError: If it can't be written.
        """
        tensors = _tensors("coefficients", member.coefficients)
        for layer, part in member.private.items():
            tensors |= _tensors(f"{layer}.A", part.A) | _tensors(f"{layer}.B", part.B)
        tensors |= {f"head.{name}": head.contiguous() for name, head in member.heads.items()}
        about = {
            "name": member.name,
            "ranks": {layer: place.r for layer, place in member.layout.places.items()},
            "private": list(member.private),
            "heads": list(member.heads),
        }
        try:
            replace_file(self.path(digest), save(tensors, {"member": json.dumps(about)}), durable=False)
        except OSError as error:
            raise BankError(
                f"{self.directory} takes no more: {error.strerror}; give cache= another place, or none"
            ) from error
        return self.get(digest) or member


def _tensors(name: str, packed: Packed | None) -> dict[str, Tensor]:
    if packed is None:
        return {}
    return {f"{name}.codes": packed.codes} | ({} if packed.steps is None else {f"{name}.steps": packed.steps})


def _packed(tensors: Mapping[str, Tensor], name: str) -> Packed:
    return Packed(codes=tensors[f"{name}.codes"], steps=tensors.get(f"{name}.steps"))


def _there(tensors: Mapping[str, Tensor], name: str) -> Packed | None:
    return _packed(tensors, name) if f"{name}.codes" in tensors else None
