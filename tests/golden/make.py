"""Writes the golden banks that aren't there: ``python tests/golden/make.py``. The files of an old one stay.

Each directory holds a bank of format 1 and ``expected.safetensors``, the updates as ``A`` and ``B`` with the scale in
``B``. Later readers must decode them to the same values.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from adapterbank.bank import Bank  # noqa: E402
from families import make_family  # noqa: E402

CASES = {
    "predictive": {"max_error": 0.05},
    "predictive-fine": {"max_error": 1e-4},
    "int16": {"k": 5},
    "eigenlora": {"method": "eigenlora", "k": 3},
    "tasks": {"max_error": 0.05, "k": 3},
}


def write_task(directory: Path, bank: Bank) -> Path:
    """A task on the directions that the bank stores."""
    basis, seeded, tensors = bank.basis(3), torch.Generator().manual_seed(7), {}
    for name, part in basis.modules.items():
        for weight, shape in (("coef_A", (2, part.k[0])), ("coef_B", (part.k[1], 2))):
            tensors[f"base_model.model.{name}.eig_{weight}"] = torch.randn(shape, generator=seeded)
    tensors["base_model.model.score.weight"] = torch.randn(2, 24, generator=seeded)
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "EIGENLORAX", "r": 2, "k": 3, "task_type": "SEQ_CLS", "modules_to_save": ["score"],
        "bank_fingerprint": basis.fingerprint, "bank_members": basis.members, "basis_probe": basis.probe,
    }  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def main() -> None:
    """Fit, save, and store what each bank gives back."""
    with tempfile.TemporaryDirectory() as scratch:
        # every feature of a member at once: heads, missing modules, two ranks, two scales, a shared basis
        family = make_family(
            scratch, n=5, ranks=(2, 3), alphas=(8.0, 16.0), hidden=24, d_out=16, layers=2, shared_rank=3, noise=0.05,
            drop_layers=0.3, classifier=2, base_model="golden/base", prefix="golden", seed=7,
        )  # fmt: skip
        for case, arguments in CASES.items():
            if (HERE / case).exists():
                continue
            bank = Bank.fit(family if case != "tasks" else family[:3], **arguments)
            if case == "tasks":
                task = write_task(Path(scratch) / "task", bank)
                bank.add({"golden_kept": task})
                bank.add({"golden_coded": task}, max_error=0.05)
            bank.save(HERE / case)
            (HERE / case / ".lock").unlink()
            expected = {}
            for name in bank.names:
                restored = bank.reconstruct(name)
                for module in restored.modules:
                    factors = restored.factors(module)
                    expected[f"{name}|{module}|A"] = factors.A
                    expected[f"{name}|{module}|B"] = factors.B * factors.scale
            save_file(expected, HERE / case / "expected.safetensors")


if __name__ == "__main__":
    main()
