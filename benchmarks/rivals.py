"""What a bank has to beat: everything that a user could do instead, with curves as fine as the method allows."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from adapterbank.adapters import LoraAdapter
from adapterbank.bank import Bank
from adapterbank.errors import BankError
from adapterbank.subspace.baselines import GROUP, quantized
from adapterbank.subspace.updates import balanced
from benchmarks.curves import Originals, Point, Restored, prefix_losses, rms, scaled

COMPONENTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


def rounding(originals: Originals) -> dict[str, list[Point]]:
    """``int8`` and ``int4`` of A and B as they are, in groups of 64 with a 16-bit scale."""
    curves = {}
    for bits in (8, 4):
        size = sum(
            quantized(f.A, f.B, f.scale, bits=bits).bytes for a in originals.adapters for f in map(a.factors, a.modules)
        )

        def decoded(adapter: LoraAdapter, bits: int = bits) -> Restored:
            coded = {m: quantized(f.A, f.B, f.scale, bits=bits) for m in adapter.modules for f in [adapter.factors(m)]}
            return {m: (c.A, c.B) for m, c in coded.items()}

        curves[f"int{bits}"] = [Point(setting="", bytes=size, error=originals.error(decoded))]
    return curves


def truncated_svds(originals: Originals) -> dict[str, list[Point]]:
    """The r' leading pairs of every update, for every r', at 32, 16, 8 and 4 bits a value."""
    rank = max(adapter.rank for adapter in originals.adapters)
    curves = {}
    for bits, label in ((32, "SVD"), (16, "SVD, 16 bits"), (8, "SVD + int8"), (4, "SVD + int4")):
        lost = torch.zeros(len(originals.adapters), rank, dtype=torch.float64)
        size = torch.zeros(rank, dtype=torch.float64)
        for i, adapter in enumerate(originals.adapters):
            for module in adapter.modules:
                update = originals.updates[adapter.name, module]
                A, B = balanced(update)
                if bits == 16:
                    A, B = A.half().float(), B.half().float()
                elif bits < 16:
                    coded = quantized(A, B, bits=bits)
                    A, B = coded.A, coded.B
                losses = prefix_losses(update, A, B)
                kept = torch.arange(1, rank + 1).clamp_max(len(losses))
                lost[i] += losses[kept - 1] / originals.energies[adapter.name]
                size += kept * _pair_bytes(A.shape[1], B.shape[0], bits)
        curves[label] = [
            Point(setting=f"r={r + 1}", bytes=int(size[r]), error=rms(lost[:, r].tolist())) for r in range(rank)
        ]
    return curves


def _pair_bytes(d_in: int, d_out: int, bits: int) -> float:
    scales = 2 * (d_in + d_out) / GROUP if bits < 16 else 0.0
    return (d_in + d_out) * bits / 8 + scales


def plain_basis(originals: Originals) -> dict[str, list[Point]]:
    """Our own shared basis with exactly k directions a side and no remainders, in 16 bits: ``Bank.fit(k=)``."""
    points = []
    for k in COMPONENTS:
        try:
            bank = Bank.fit(originals.directories, k=k)
        except BankError:  # more than the adapters have
            break
        points.append(_bank_point(f"k={k}", bank))
    return {"plain basis": points}


def _bank_point(setting: str, bank: Bank) -> Point:
    summary = bank.summary()
    return Point(setting=setting, bytes=summary["bytes"], error=summary["error"])


def lorashare(originals: Originals) -> dict[str, list[Point]]:
    """``lorashare`` at many k, from one eigendecomposition: fewer components are the leading ones of more."""
    from lorashare import SHAREModel
    from lorashare.compression import reconstruct_adapter_weights
    from lorashare.io import save_share_checkpoint

    paths = {adapter.name: str(path) for adapter, path in zip(originals.adapters, originals.directories, strict=True)}
    width = min(min(s.d_in, s.d_out) for s in originals.adapters[0].modules.values())
    most = min(max(COMPONENTS), width, sum(a.rank for a in originals.adapters))
    model = SHAREModel.from_adapters(paths, num_components=most, device="cpu")
    points = []
    for k in [k for k in COMPONENTS if k <= most]:
        components = {key: value[:, :k].contiguous() for key, value in model.components.items()}
        loadings = {n: {key: v[:k].contiguous() for key, v in own.items()} for n, own in model.all_loadings.items()}
        with _scratch() as out:
            # without the paths of the originals, which it would store
            save_share_checkpoint(out, model.config, components, loadings, model.adapter_configs)
            size = disk_bytes(out)

        def decoded(adapter: LoraAdapter, components: Any = components, loadings: Any = loadings) -> Restored:
            return scaled(adapter, reconstruct_adapter_weights(components, loadings[adapter.name]))

        points.append(Point(setting=f"k={k}", bytes=size, error=originals.error(decoded)))
    return {"lorashare": points}


def vlora(originals: Originals) -> dict[str, list[Point]]:
    """``vlora`` at k = 1, 2, 4... components, as floats and in its NF4 format."""
    from vlora import SharedSubspace, load_adapter

    loaded = [load_adapter(path) for path in originals.directories]
    names = [adapter.name for adapter in originals.adapters]
    curves: dict[str, list[Point]] = {"vlora": [], "vlora, NF4": []}
    for k in sorted({min(k, len(loaded) - 1) for k in (1, 2, 4, 8, 16, 32, 64)}):
        space = SharedSubspace.from_adapters(loaded, task_ids=names, num_components=k)
        for label, save in (("vlora", space.save), ("vlora, NF4", space.save_quantized)):
            with _scratch() as out:
                save(out)
                read, size = SharedSubspace.load(out), disk_bytes(out)

            def decoded(adapter: LoraAdapter, read: Any = read) -> Restored:
                weights = read.reconstruct(adapter.name)
                return {m: (weights.lora_a[m], adapter.scales[m] * weights.lora_b[m]) for m in adapter.modules}

            curves[label].append(Point(setting=f"k={k}", bytes=size, error=originals.error(decoded)))
    return curves


RIVALS = (rounding, truncated_svds, plain_basis, lorashare, vlora)


def disk_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@contextmanager
def _scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="adapterbank-bench-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
