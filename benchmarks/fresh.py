"""Jobs that run in a process of their own, so that their time and memory are nobody else's. Prints one line of JSON.

Heavy imports stay inside the jobs: start-up is part of what is measured.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any


def fit_bank(folder: Path, out: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """What ``adapterbank fit FOLDER/* -o OUT`` does."""
    from adapterbank.bank import Bank

    Bank.fit(_adapters(folder), **arguments).save(out)
    return {}


def fit_lorashare(folder: Path, out: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """``lorashare compress``."""
    from lorashare import SHAREModel

    SHAREModel.from_adapters(_adapters(folder), device="cpu", **arguments).save_pretrained(out)
    return {}


def fit_vlora(folder: Path, out: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """``vlora compress``."""
    from vlora import init_subspace

    paths = _adapters(folder)
    init_subspace(paths, task_ids=[Path(path).name for path in paths], **arguments).save(out)
    return {}


def open_and_restore(folder: Path, out: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """Open a bank, restore one member; seconds of each and bytes read, with the imports done before."""
    from adapterbank.bank import Bank

    start, read = time.perf_counter(), _bytes_read()
    bank = Bank.load(out)
    opened, read_index = time.perf_counter(), _bytes_read()
    name = bank.names[len(bank) // 2]
    bank.reconstruct(name)
    restored, read_member = time.perf_counter(), _bytes_read()
    return {
        "open_seconds": opened - start,
        "restore_seconds": restored - opened,
        "bytes_read_to_open": read_index - read,
        "bytes_read_to_restore": read_member - read_index,
        "bytes_of_member_and_basis": bank[name].bytes + bank.index.basis_bytes,
        "bank_bytes": bank.bytes,
        **{key: bank.summary()[key] for key in ("ratio", "error")},
    }


def train(folder: Path, out: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """Adapt a model and train two steps; how far the memory rises above that with the model and all imports."""
    import torch

    import adapterbank.tuner  # noqa: F401, for all variants, so that it is in nobody's account
    from adapterbank.shira.sampling import sampled_gradient
    from benchmarks.trained import JOBS, adapted, stepper

    sampled_gradient(torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1, dtype=torch.int32))  # loads the compiler
    torch.set_num_threads(1)
    subject = JOBS[arguments["subject"]](**arguments["arguments"])
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: loading the model isn't what is measured
    before = int(_line("/proc/self/status", "VmRSS"))
    model = adapted(arguments["variant"], subject, folder, **arguments["sizes"])
    step = stepper(model, subject)
    for _ in range(2):  # the second finds the optimizer's state beside everything else
        step()
    return {"peak_mb_above_model": (int(_line("/proc/self/status", "VmHWM")) - before) * 1024 / 1e6}


def _adapters(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.iterdir())


def _bytes_read() -> int:
    return int(_line("/proc/self/io", "rchar"))


def _line(file: str, name: str) -> str:
    return next(line.split()[1] for line in Path(file).read_text().splitlines() if line.startswith(f"{name}:"))


if __name__ == "__main__":
    job, folder, out, arguments = sys.argv[1:]
    result = globals()[job](Path(folder), Path(out), json.loads(arguments))
    # of this process alone: what rusage calls the peak begins with that of the parent
    result["peak_mb"] = int(_line("/proc/self/status", "VmHWM")) * 1024 / 1e6
    sys.stdout.write(json.dumps(result) + "\n")
