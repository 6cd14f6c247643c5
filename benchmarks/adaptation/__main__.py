"""``python -m benchmarks.adaptation [PART...]``: run what is missing of the study, then write its page."""

import argparse
import importlib
import os
import sys
import warnings

from rich.console import Console

from benchmarks.adaptation.quick import rerun
from benchmarks.adaptation.runs import run_all
from benchmarks.adaptation.sparse.study import PARTS as SPARSE_PARTS
from benchmarks.adaptation.study import PARTS as BANK_PARTS

PARTS = {**BANK_PARTS, **SPARSE_PARTS}


def main() -> None:
    """Run the named parts, or all, in the study's order: later ones use the rates that earlier ones chose."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adaptation", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (default: 2)")
    parser.add_argument("--quick", action="store_true", help="rerun one row of the main table and compare")
    options = parser.parse_args()
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"there is no part {sorted(unknown)[0]!r}; there are {', '.join(PARTS)}")
    os.environ["OMP_NUM_THREADS"] = "1"  # before the workers start
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    console = Console(highlight=False)
    if options.quick:
        sys.exit(0 if rerun(workers=options.workers, told=console.print) else 1)
    for name in options.parts or PARTS:
        while True:  # a part may want more runs when it has seen some
            runs = list(PARTS[name]())
            console.print(f"[bold]{name}")
            if not run_all(runs, workers=options.workers, told=console.print):
                break
    importlib.import_module("benchmarks.tables").write()


if __name__ == "__main__":
    main()
