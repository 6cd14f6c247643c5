"""``python -m benchmarks.tables [--check]``: the README's tables, docs/benchmarks and the picture, from the JSON."""

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.adaptation.page import brief as adaptation_brief
from benchmarks.adaptation.page import page as adaptation_page
from benchmarks.adaptation.plots import draw as draw_adaptation
from benchmarks.adaptation.sparse.page import sections as sparse_on_real_tasks
from benchmarks.adaptation.sparse.plots import draw as draw_sparse
from benchmarks.markdown import table, targets
from benchmarks.pictures import PICTURES, draw_orthogonality, draw_rate_distortion, draw_switching, draw_working_set
from benchmarks.record import read_results
from benchmarks.serving_page import page as serving_page
from benchmarks.sparse_page import by_density_and_width
from benchmarks.sparse_page import page as sparse_page

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- made by python -m benchmarks.tables -->", "<!-- end -->"
Result = dict[str, Any]

RATE_DISTORTION = (
    "real-private", "real-oneseed", "planted60", "same-init", "nothing-shared",
    "gauge-balanced", "gauge-orthogonal", "gauge-scale", "gauge-random",
)  # fmt: skip
README_RATIOS = (7.5, 15, 30)


def main() -> None:
    """Write the pages, or say which are out of date."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page would change")
    if not parser.parse_args().check:
        write()
        return
    old = [path for path, text in pages(read_results()).items() if not path.exists() or path.read_text() != text]
    if old:
        names = ", ".join(str(path.relative_to(ROOT)) for path in old)
        sys.exit(f"Error: {names} out of date; run python -m benchmarks.tables")


def write() -> None:
    """Write every page and the picture."""
    results = read_results()
    for path, text in pages(results).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if "real-private" in results:
        draw_rate_distortion(results["real-private"], PICTURES / "rate-distortion.svg")
    if "sparse-switch" in results:
        draw_switching(by_density_and_width(results["sparse-switch"]["rows"]), PICTURES / "sparse-switch.svg")
    if "sparse-orthogonality" in results:
        draw_orthogonality(results["sparse-orthogonality"]["rows"], PICTURES / "sparse-orthogonality.svg")
    if "serving-growth" in results:
        draw_working_set(results["serving-growth"]["working_sets"], PICTURES / "serving-working-set.svg")
    draw_adaptation(PICTURES)
    draw_sparse(PICTURES)


def pages(results: dict[str, Result]) -> dict[Path, str]:
    """Every generated page by its path."""
    readme = (ROOT / "README.md").read_text()
    before, rest = readme.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    docs = ROOT / "docs" / "benchmarks"
    return {
        ROOT / "README.md": f"{before}{BEGIN}\n\n{_readme(results)}\n{END}{after}",
        docs / "rate-distortion.md": _rate_distortion_page(results),
        docs / "peers.md": _peers_page(results),
        docs / "growth.md": _growth_page(results),
        docs / "accuracy.md": _accuracy_page(results),
        docs / "training.md": _training_page(results),
        docs / "adaptation.md": _page(adaptation_page()),
        docs / "shira.md": _page(_sparse_page(results)),
        docs / "serving.md": _page(_serving_page(results)),
    }


# --- README -----------------------------------------------------------------------------------------------------------


def _readme(results: dict[str, Result]) -> str:
    shown = [results[name] for name in RATE_DISTORTION if name in results and not name.startswith("gauge")]
    compared = [row for name in RATE_DISTORTION if name in results for row in results[name]["rows"]]
    against = [row for row in compared if row["best_rival"]]
    better = sum(row["not_worse"] for row in against)
    header = ["adapters", *(f"{ratio:g}x smaller" for ratio in README_RATIOS)]
    rows = [[f"{r['title']} ({r['adapters']})", *(_versus(r, ratio) for ratio in README_RATIOS)] for r in shown]
    parts = [
        "Error at equal bytes, **the bank's** first, then that of the best rival:",
        table(header, rows),
        f"The bank had the smaller error in {better} of {len(against)} comparisons from 2x to 120x "
        "([all of them](docs/benchmarks/rate-distortion.md)).",
    ]
    parts += [_accuracy_table(_accuracies(results), "Task accuracy with stock PEFT, before and after:")]
    parts += adaptation_brief()
    if "peers" in results:
        parts += [
            "Fitting 20 adapters (126 MB) in a fresh process, start-up of torch included, one thread:",
            _peers_table(results["peers"]),
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _versus(result: Result, ratio: float) -> str:
    row = next(row for row in result["rows"] if row["asked"] == ratio)
    rival = f", {_error(row['best_rival_error'])} {row['best_rival']}" if row["best_rival"] else ""
    return f"**{_error(row['error'])}**{rival}"


# --- pages ------------------------------------------------------------------------------------------------------------


def _rate_distortion_page(results: dict[str, Result]) -> str:
    parts = [
        "# Error against bytes",
        "The error is that of the update, `||dW - dW'|| / ||dW||`, root mean square over the adapters. Bytes are "
        "bytes on disk with the basis and everything else; of int8, int4 and SVD the payload. A rival may have 2 % "
        "more bytes than the bank. *Bound*: the Gaussian rate-distortion bound of coding each adapter alone; less than "
        "1x of it is possible only where adapters share something.",
        "![Error against bytes on real adapters](../pictures/rate-distortion.svg)",
    ]
    for name in RATE_DISTORTION:
        if name in results:
            parts += _rate_distortion_section(results[name])
    return _page(parts)


def _rate_distortion_section(result: Result) -> list[str]:
    rows = [
        [
            f"{row['ratio']:.1f}x",
            f"**{_error(row['error'])}**",
            row["best_rival"] or "none so small",
            _error(row["best_rival_error"]) if row["best_rival"] else "",
            f"{row['over_bound']:.2f}x",
        ]
        for row in result["rows"]
    ]
    shape = f"{result['adapters']} adapters of rank {result['rank']}, {result['modules']} modules each"
    parts = [
        f"## {result['title']}",
        f"{shape}, {result['bytes_fp32'] / 1e6:.1f} MB in 32 bits.",
        table(["ratio", "bank", "best rival", "its error", "bank / bound"], rows),
    ]
    promised = [
        f"{_error(t['error'])} at {t['ratio']:g}x (target {t['at_most']:g}: {'met' if t['met'] else 'missed'})"
        for t in result["targets"]
    ]
    return [*parts, *([f"Targets: {', '.join(promised)}."] if promised else []), _about(result)]


def _peers_page(results: dict[str, Result]) -> str:
    parts = ["# Beside the peers"]
    if "peers" in results:
        result = results["peers"]
        parts += [
            f"{result['adapters']} planted adapters, {result['bytes_fp32'] / 1e6:.0f} MB. Each fit runs in a fresh "
            f"process with one thread, the tools take turns, {result['rounds']} rounds. CPU seconds are the median and "
            "include the start of Python and torch; the peak is the largest.",
            _peers_table(result),
            _about(result),
        ]
    return _page(parts)


def _peers_table(result: Result) -> str:
    rows = [
        [r["tool"], f"{r['cpu_seconds']:.1f}", f"{r['peak_mb']:.0f} MB", f"{r['ratio']:.1f}x", _error(r["error"])]
        for r in result["rows"]
    ]
    return table(["", "CPU s", "peak memory", "ratio", "error of the update"], rows)


def _growth_page(results: dict[str, Result]) -> str:
    parts = ["# Growth with the number of adapters"]
    if "growth" in results:
        result = results["growth"]
        rows = [
            [
                str(r["adapters"]), r["setting"], f"{r['cpu_seconds']:.1f}", f"{r['peak_mb']:.0f} MB",
                f"{r['bank_bytes'] / 1e6:.1f} MB", f"{r['ratio']:.1f}x", _error(r["error"]),
                f"{1000 * r['open_seconds']:.0f} ms", f"{1000 * r['restore_seconds']:.0f} ms",
                f"{r['bytes_read_to_restore'] / 1e3:.0f} kB",
            ]
            for r in result["rows"]
        ]  # fmt: skip
        header = [
            "adapters",
            "setting",
            "fit, CPU s",
            "fit, peak",
            "bank",
            "ratio",
            "error",
            "open",
            "restore one",
            "read for that",
        ]
        parts += [
            "Adapters of rank 8, width 1024, 12 modules; every step in a fresh process with one thread.",
            table(header, rows),
            "\n".join(
                f"- {name}: the largest needs {g['peak_largest_over_middle']:.2f} times the memory of the middle size, "
                f"and {g['cpu_seconds_per_adapter_middle_to_largest']:.3f} CPU seconds for each further adapter; up to "
                f"the middle size it is {g['cpu_seconds_per_adapter_small_to_middle']:.3f}."
                for name, g in result["growth"].items()
            ),
            _about(result),
        ]
    return _page(parts)


def _accuracy_page(results: dict[str, Result]) -> str:
    found = _accuracies(results)
    parts = [
        "# Task accuracy of restored adapters",
        "Each adapter is loaded by stock PEFT, as trained and as restored from a bank, and labels the same test texts. "
        "After ± stands one standard error of the change, paired text by text.",
        _accuracy_table(found, ""),
    ]
    for result in found:
        at = result["rows"]
        rows = [
            [name, f"{before:.3f}", *(f"{row['by_adapter_after'][name]:.3f}" for row in at)]
            for name, before in result["by_adapter_before"].items()
        ]
        header = ["adapter", "as trained", *(f"{row['ratio']:.1f}x" for row in at)]
        parts += [f"## {result['title'].split(', ')[-1]}", table(header, rows), _about(result)]
    return _page(parts)


def _accuracies(results: dict[str, Result]) -> list[Result]:
    return [results[name] for name in ("accuracy-private", "accuracy-oneseed") if name in results]


def _accuracy_table(found: list[Result], title: str) -> str:
    rows = [
        [
            f"{result['title'].split(', ')[-1]} ({result['adapters']} adapters)",
            f"{row['ratio']:.1f}x",
            _error(row["error"]),
            f"{result['accuracy_before']:.3f}",
            f"{row['accuracy_after']:.3f}",
            f"{row['change']:+.4f} ± {row['standard_error_of_change']:.4f}",
        ]
        for result in found
        for row in result["rows"]
    ]
    header = ["real adapters", "ratio", "error of the update", "accuracy before", "after", "change"]
    return "\n\n".join(part for part in (title, table(header, rows)) if part) if rows else ""


def _training_page(results: dict[str, Result]) -> str:
    parts = [
        "# Training in a bank",
        "CPU seconds of one thread. The method and PEFT's LoRA take turns step by step; shares are medians over pairs.",
    ]
    if "training-step" in results:
        parts += _training_step_section(results["training-step"])
    if "many-adapters" in results:
        parts += _many_adapters_section(results["many-adapters"])
    if "contraction" in results:
        parts += _contraction_section(results["contraction"])
    return _page(parts)


def _training_step_section(result: Result) -> list[str]:
    rows = []
    for row in result["rows"]:
        counted, (low, high) = row["counted_bytes"]["bank"], row["cpu_share_quartiles"]
        rows.append(
            [
                row["model"],
                f"{row['cpu_seconds']['bank']:.3g}",
                f"{row['cpu_share_of_lora']:.3f} ({low:.2f} to {high:.2f})",
                f"{(sum(counted.values()) - counted['basis']) / 1e6:.1f} MB",
                f"{row['counted_share_of_lora']:.3f}",
                f"{counted['basis'] / 1e6:.1f} MB",
                f"{row['counted_share_with_basis']:.3f}",
                f"{row['peak_mb_above_model']['bank']:.0f} MB",
                f"{row['peak_share_of_lora']:.3f}",
            ]
        )
    header = [
        "one step", "CPU s", "of LoRA's (quartiles)", "counted", "of LoRA's", "basis", "with it, of LoRA's", "peak",
        "of LoRA's",
    ]  # fmt: skip
    return [
        f"## {result['title']}",
        f"Rank {result['r']}; k = {result['k']}. A step is forward, backward, AdamW. *Counted* are the trained "
        "parameters, the optimizer's state and what autograd saves, each storage once, without the frozen model; the "
        "basis is shared by all adapters of a model. *Peak*: resident memory above the loaded model, in a process of "
        "its own.",
        table(header, rows),
        targets(result),
        _about(result),
    ]


def _many_adapters_section(result: Result) -> list[str]:
    def row(name: str, times: dict[str, float]) -> list[str]:
        lora, bank = times["lora"], times["bank"]
        return [name, f"{1e3 * lora:.0f} ms", f"{1e3 * bank:.1f} ms", f"{bank / lora:.4f}"]

    of = result["cpu_seconds"]
    rows = [row(f"add the {r['adapters']}th", r) for r in result["rows"]]
    rows += [row(f"`set_adapter` among {result['adapters']}", {name: of[name]["set"] for name in of})]
    return [
        f"## {result['title']}",
        f"{result['layers']} layers of {result['width']}, rank {result['r']}, k = {result['k']}; one adapter after the "
        f"other with `add_adapter`. All {result['adapters']}: {of['lora']['all']:.0f} s with LoRA, "
        f"{of['bank']['all']:.1f} s in the bank.",
        table(["", "PEFT's LoRA", "bank", "share"], rows),
        targets(result),
        _about(result),
    ]


def _contraction_section(result: Result) -> list[str]:
    rows = [
        [
            mode,
            f"{100 * result['right'][mode]:.0f} %",
            *(f"{cost[name]:.3f}x" for name in ("rule", "always_basis", "always_built")),
        ]
        for mode, cost in result["cost_of_choice"].items()
    ]
    header = ["", "rule is right", "time with the rule", "always through the basis", "always built factors"]
    return [
        f"## {result['title']}",
        f"The update alone, at {result['points']} points of d, k, r and tokens. The rule is right where it takes the "
        f"faster side; within {100 * result['tie']:.0f} % both are. Times are over those of always the faster side.",
        table(header, rows),
        targets(result),
        _about(result),
    ]


def _sparse_page(results: dict[str, Result]) -> list[str]:
    shown = [results[name] for name in ("sparse-step", "sparse-switch") if name in results]
    return [*sparse_page(results), *(_about(result) for result in shown), *sparse_on_real_tasks()]


def _serving_page(results: dict[str, Result]) -> list[str]:
    shown = [results[name] for name in ("serving-layer", "serving-decoder", "serving-growth") if name in results]
    return [*serving_page(results), *(_about(result) for result in shown)]


# --- Markdown ---------------------------------------------------------------------------------------------------------


def _page(parts: list[str]) -> str:
    note = "Generated from committed JSON by `python -m benchmarks.tables`."
    return "\n\n".join(part for part in (*parts, note) if part) + "\n"


def _about(result: Result) -> str:
    about = result["about"]
    versions = ", ".join(f"{name} {about['versions'][name]}" for name in ("adapterbank", "torch", "numpy"))
    return f"<sub>{about['date']}, commit {about['commit']}, seed {about['seed']}, {about['machine']}, {versions}</sub>"


def _error(error: float) -> str:
    """Three digits, or two that count: .0347, .144, .00041."""
    return (f"{error:.3f}" if error >= 0.1 else f"{error:.2g}" if error < 0.001 else f"{error:.4f}").removeprefix("0")


if __name__ == "__main__":
    main()
