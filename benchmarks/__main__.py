"""``python -m benchmarks [NAME...]``: run cases, write their JSON, then the tables and pictures."""

import argparse
import importlib
import time

from rich.console import Console

from benchmarks.cases import load_cases
from benchmarks.record import write_result


def main() -> None:
    """Run the named cases, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="file in cases/ without .toml; default: all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    console = Console(highlight=False)
    for case in load_cases(options.names):
        start = time.perf_counter()
        console.print(f"{case.name}: {case.title}")
        run = importlib.import_module(f"benchmarks.{case.kind.replace('-', '_')}").run
        path = write_result(case.name, run(case, options.seed), options.seed)
        console.print(f"  {path.name} after {time.perf_counter() - start:.0f} s")
    importlib.import_module("benchmarks.tables").write()


if __name__ == "__main__":
    main()
