"""Trained tasks on their way into a bank: matched to its modules and its basis, as they are or as ordinary adapters."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adapterbank.adapters import LoraAdapter, LoraFactors
from adapterbank.adapters.names import match_layers
from adapterbank.adapters.task import SAVED_BASIS, TrainedTask, open_adapter
from adapterbank.bank.family import Source, open_source
from adapterbank.bank.index import ModuleEntry, TaskEntry
from adapterbank.bank.shared_basis import BankBasis
from adapterbank.bank.task import TaskCoefficients, task_factors
from adapterbank.codec.rows import packed_width
from adapterbank.errors import AdapterError, BankError

if TYPE_CHECKING:
    from adapterbank.bank.bank import Bank


class TaskOpener:
    """Opens sources as ``open_source`` does, and tasks that were trained in ``bank`` too."""

    def __init__(self, bank: "Bank") -> None:
        self.bank = bank
        self.tasks: dict[LoraAdapter, TaskCoefficients] = {}
        """Of the adapters that were opened, those that are only coefficients on directions that the bank can derive."""

    def __call__(self, name: str | None, source: Source, *, allow_pickle: bool) -> LoraAdapter:
        """Open one adapter or task under ``name``, or its own.

        Raises:
            AdapterError: If it can't be used.
            BankError: If it is a task of another bank, or of this one before it changed.
        """
        if isinstance(source, LoraAdapter):
            return open_source(name, source, allow_pickle=allow_pickle)
        opened = open_adapter(source, name=name, allow_pickle=allow_pickle)
        if isinstance(opened, LoraAdapter):
            return opened
        adapter, coefficients = multiply_out(opened, self.bank)
        if coefficients is not None:
            self.tasks[adapter] = coefficients
        return adapter


def multiply_out(task: TrainedTask, bank: "Bank") -> tuple[LoraAdapter, TaskCoefficients | None]:
    """A trained task as an ordinary adapter, exactly, and its coefficients where they are all that it is.

    Args:
        task: The task.
        bank: Its bank.

    Raises:
        AdapterError: If the task's weights don't fit its config or the bank's modules.
        BankError: If the bank has another basis than the task was trained on.
    """
    where = f"task {task.name!r}"
    modules = _modules_of(task, bank.index.modules, where)
    basis = _basis_of(task, bank, where)
    factors: dict[str, LoraFactors] = {}
    weights: dict[str, Mapping[str, Tensor]] = {}
    shared = basis is not None and not _is_private(task)
    for layer, module in modules.items():
        part = _Layer(task, layer, module, basis)
        weights[module.name] = part.weights()
        A, B = task_factors(
            weights[module.name], part.V, part.U, k=part.k, sizes=(module.d_in, module.d_out), scale=task.config.scale,
            bits=task.config.gradient_bits,
        )  # fmt: skip
        factors[module.name] = LoraFactors(A=A.contiguous(), B=B.contiguous(), scale=1.0)
        shared = shared and part.is_shared
    # a task on directions of this bank was trained on the bank's base model, by whatever name or from whatever folder
    adapter = task.as_lora(factors, base=bank.index.base if basis is not None and basis.k else None)
    if not shared or basis is None:
        return adapter, None
    config = task.config
    probe = config.basis_probe
    if probe is None or config.random_directions:  # the task's own knows nothing of the random ones
        probe = basis.probe
    entry = TaskEntry(
        k=config.k, members=basis.members, fingerprint=basis.fingerprint, probe=probe, core=config.train == "core",
        random=config.random_directions, seed=config.seed if config.random_directions else 0,
    )  # fmt: skip
    rank = {name: shape.rank for name, shape in adapter.modules.items()}
    return adapter, TaskCoefficients(entry=entry, scale=task.config.scale, rank=rank, weights=weights)


def _modules_of(task: TrainedTask, modules: tuple[ModuleEntry, ...], where: str) -> dict[str, ModuleEntry]:
    """The bank's module of each layer of a task."""
    known = {module.name: module for module in modules}
    try:
        found = match_layers(known, task.layers)
    except AdapterError as error:
        raise AdapterError(f"{where}: {error}") from error
    lacking = sorted(task.layers.keys() - found.keys())
    if lacking:
        raise AdapterError(
            f"{where}: the bank has no module for its layer {lacking[0]}"
            + (f" and {len(lacking) - 1} more" if len(lacking) > 1 else "")
            + f"; it has e.g. {next(iter(known), 'none at all')}; add the task to the bank that it was trained in"
        )
    return {layer: known[module] for layer, module in found.items()}


def _brings(task: TrainedTask, layer: str) -> bool:
    """Whether a layer's whole basis is in the task's file."""
    names = task.layers[layer].keys()
    return {"eig_V", "eig_U"} <= names or names >= set(SAVED_BASIS)


def _basis_of(task: TrainedTask, bank: "Bank", where: str) -> BankBasis | None:
    """The bank's basis that the task means, and its random directions; none where it brought another basis along."""
    config, needed = task.config, not all(_brings(task, layer) for layer in task.layers)
    if needed and config.base_directions:
        raise AdapterError(
            f"{where}: its base_directions come from the base model's weights, which the bank has not; export it with "
            "adapterbank.tuner.export_lora and add that"
        )
    if needed and config.bank_fingerprint is None:
        raise AdapterError(f"{where}: its config has no bank_fingerprint, so its basis is unknown; save it again")
    if not needed and config.bank_fingerprint is None:
        return None
    try:
        basis = bank.basis(config.k, members=config.bank_members)
        basis.check(config.bank_fingerprint, config.basis_probe, where)
        if config.random_directions:
            return bank.basis(
                config.k, members=config.bank_members, random_directions=config.random_directions, seed=config.seed
            )
    except BankError as error:
        if not needed:
            return None
        raise BankError(f"{where} can't join this bank: {error}") from error
    return basis


def _is_private(task: TrainedTask) -> bool:
    """Whether a task has anything that bank, seed and coefficients do not say."""
    c = task.config
    own = any("eig_V" in weights for weights in task.layers.values())
    beside = c.base_directions or c.gradient_directions
    return bool(own or beside or c.free_rank or c.use_mean or c.train == "components")


class _Layer:
    """One layer of a task on its basis: the task's own one, one saved with it, or the bank's."""

    def __init__(self, task: TrainedTask, layer: str, module: ModuleEntry, basis: BankBasis | None) -> None:
        self.task, self.layer, self.module = task, layer, module
        self.where = f"task {task.name!r}, {layer}"
        shared = None if basis is None else basis.modules[module.name]
        pair = ("eig_V", "eig_U") if "eig_V" in task.layers[layer] else SAVED_BASIS
        mean = int(task.config.use_mean)
        self.is_shared = True
        if _brings(task, layer):
            self.V, self.U = self._saved(*pair)
            self.k = len(self.V) - mean, int(self.U.shape[1]) - mean
            # another machine may have derived other directions under the same name
            self.is_shared = shared is not None and torch.equal(self.V, shared.V) and torch.equal(self.U, shared.U)
        elif shared is not None:
            self.V, self.U, self.k = shared.V, shared.U, shared.k
            if mean:
                if shared.mean_in is None or shared.mean_out is None:
                    raise BankError(f"{self.where}: it uses the mean of a centred basis, this bank's has none")
                self.V = torch.cat([self.V, shared.mean_in[None]])
                self.U = torch.cat([self.U, shared.mean_out[:, None]], dim=1)
        else:
            raise AdapterError(f"{self.where}: its file holds no basis; save it again, or add it to its own bank")

    def _saved(self, name_V: str, name_U: str) -> tuple[Tensor, Tensor]:
        V, U = self.task.shape(self.layer, name_V), self.task.shape(self.layer, name_U)
        mean, (d_in, d_out) = int(self.task.config.use_mean), (self.module.d_in, self.module.d_out)
        fits = len(V) == len(U) == 2 and V[0] >= mean and U[1] >= mean and V[1] >= d_in
        if not fits or V[1] % d_in or U[0] != V[1] // d_in * d_out:
            raise AdapterError(
                f"{self.where}: its own basis is {V} and {U}, the bank's layer maps {d_in} to {d_out} features; was it "
                "trained on another base model?"
            )
        return self.task.read(self.layer, name_V), self.task.read(self.layer, name_U)

    def weights(self) -> dict[str, Tensor]:
        """Everything but the basis, read after its shapes were compared with what config and basis say."""
        expected = self._shapes()
        stored = {name for name in self.task.layers[self.layer] if name not in ("eig_V", "eig_U", *SAVED_BASIS)}
        for name, shape in expected.items():
            if name not in stored:
                raise AdapterError(f"{self.where}: {name} is missing, its config says there is one; copy it again")
            found = self.task.shape(self.layer, name)
            if found != shape:
                raise AdapterError(
                    f"{self.where}: {name} is {found}, config and basis say {shape}; was the config changed, or is "
                    "this another bank?"
                )
        if strangers := stored - expected.keys():
            raise AdapterError(f"{self.where}: it holds {min(strangers)}, its config says nothing of it; copy it again")
        return {name: self.task.read(self.layer, name) for name in expected}

    def _shapes(self) -> dict[str, tuple[int, int]]:
        config, (k_in, k_out), q = self.task.config, self.k, self.task.config.gradient_directions
        d_in, d_out = self.module.d_in, self.module.d_out
        fold = int(self.V.shape[1]) // d_in
        if config.train == "core":
            shapes = {"eig_core": (k_out, k_in)}
        else:
            rows = config.r // fold
            shapes = {"eig_coef_A": (rows, k_in + q), "eig_coef_B": (k_out + q, rows)}
        if fold > 1 and (config.train == "core" or config.r != fold):
            raise AdapterError(f"{self.where}: r={config.r} on a flat basis of rank {fold}; is this another bank?")
        if q:
            shapes["eig_gradient_in"] = (q, packed_width(d_in, config.gradient_bits))
            shapes["eig_gradient_out"] = (q, packed_width(d_out, config.gradient_bits))
        if config.free_rank:
            shapes |= {"eig_free_A": (config.free_rank, d_in), "eig_free_B": (d_out, config.free_rank)}
        return shapes
