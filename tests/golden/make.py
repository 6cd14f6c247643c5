"""Writes the golden banks: ``python tests/golden/make.py``. Only for a new format; the files of an old one stay.

Each directory holds a bank of format 1 and ``expected.safetensors``, the updates as ``A`` and ``B`` with the scale in
``B``. Later readers must decode them to the same values.
"""

import shutil
import sys
import tempfile
from pathlib import Path

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
}


def main() -> None:
    """Fit, save, and store what each bank gives back."""
    with tempfile.TemporaryDirectory() as scratch:
        # every feature of a member at once: heads, missing modules, two ranks, two scales, a shared basis
        family = make_family(
            scratch, n=5, ranks=(2, 3), alphas=(8.0, 16.0), hidden=24, d_out=16, layers=2, shared_rank=3, noise=0.05,
            drop_layers=0.3, classifier=2, base_model="golden/base", prefix="golden", seed=7,
        )  # fmt: skip
        for case, arguments in CASES.items():
            shutil.rmtree(HERE / case, ignore_errors=True)
            bank = Bank.fit(family, **arguments)
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
