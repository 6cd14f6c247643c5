import json

import pytest
import torch
from benchmarks.adaptation import analysis, results
from benchmarks.adaptation.analysis import Part, paired, reached
from benchmarks.adaptation.methods import Method
from benchmarks.adaptation.runs import Run
from benchmarks.adaptation.sources import Recycled
from benchmarks.adaptation.spectrum import spectrum, turned
from benchmarks.adaptation.summary import said
from benchmarks.adaptation.words import told

from adapterbank.adapters import LoraAdapter, LoraFactors

CURVE = [(0.0, 1.0), (0.5, 0.6), (1.0, 0.4)]


def test_a_loss_is_reached_between_two_points_on_a_straight_line():
    assert reached(CURVE, 0.8) == pytest.approx(0.25)
    assert reached(CURVE, 0.6) == 0.5
    assert reached(CURVE, 2.0) == 0.0
    assert reached(CURVE, 0.1) is None


def test_a_loss_that_comes_and_goes_counts_when_it_first_came():
    assert reached([(0.2, 0.9), (0.4, 0.5), (1.0, 0.8)], 0.7) == pytest.approx(0.3)


def test_paired_differences_know_cells_and_tasks():
    found = paired({("a", 0): 0.1, ("a", 1): 0.3, ("b", 0): -0.1, ("b", 1): 0.1})
    assert found.mean == pytest.approx(0.1)
    assert found.error == pytest.approx(0.0816, abs=1e-3)
    assert found.error_over_tasks == pytest.approx(0.1)
    assert paired({("a", 0): 0.2}).error == 0.0


@pytest.fixture
def part(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    for method, gain in (("LoRA r=8", 0.0), ("bank", 0.1)):
        for task, base in (("a", 0.5), ("b", 0.7)):
            for seed in (0, 1):
                validation = [[0, 1.0, 0.5], [40, 0.8 - gain, 0.6], [80, 0.6 - gain, 0.7]]
                result = {"accuracy": base + gain + 0.02 * seed, "validation": validation}
                line = {
                    "key": f"{method}{task}{seed}",
                    "part": "p",
                    "task": task,
                    "seed": seed,
                    "result": result,
                    "sources": None,
                }
                results.append({**line, "method": {"name": method, "lr": 1e-2, "head_lr": 1e-2}})
    return Part.read("p")


def test_a_part_gives_means_spreads_and_differences(part):
    assert part.tasks == ["a", "b"]
    assert part.mean("bank") == pytest.approx(0.71)
    assert part.mean("bank", task="a") == pytest.approx(0.61)
    assert part.spread("bank") == pytest.approx(0.02 / 2**0.5)
    assert part.difference("bank", "LoRA r=8").mean == pytest.approx(0.1)
    assert part.mean_curve("bank") == [(0.0, 1.0), (0.5, pytest.approx(0.7)), (1.0, pytest.approx(0.5))]


def test_lines_are_read_as_they_were_written(part):
    assert len(results.load_results("p")) == 8
    assert json.loads((results.RESULTS / "p.jsonl").read_text().splitlines()[0])["part"] == "p"
    assert results.load_results("none") == {}
    assert analysis.standard_error([1.0]) == 0.0


def test_a_committed_line_is_found_by_its_run():
    # fields that came later must not change the keys of what was run before
    for line in results.load_results("main").values():
        known = {name: line[name] for name in ("part", "subject", "task", "seed", "examples", "steps")}
        bank = line["sources"] and Recycled(**line["sources"])
        run = Run(method=Method(**line["method"]), sources=bank, join=tuple(line.get("join", ())), **known)
        assert run.key == line["key"]


def test_a_median_of_what_was_never_reached_is_never():
    assert told([0.2, 0.4, None]) == "40 % (1 never)"
    assert told([0.2, 0.4, None, None]) == "never (2 never)"  # not the mean of 40 % and some invented share
    assert told([0.5, 0.7]) == "70 %"


def test_an_answer_needs_two_standard_errors_of_both_kinds():
    clear = paired({("a", 0): 0.10, ("a", 1): 0.11, ("b", 0): 0.10, ("b", 1): 0.11})
    by_task = paired({("a", 0): 0.0, ("a", 1): 0.0, ("b", 0): 0.1, ("b", 1): 0.1})
    nothing = paired({("a", 0): 0.1, ("b", 0): -0.1, ("c", 0): 0.0})
    assert said(clear, nothing) == "better accuracy"
    assert said(nothing, clear) == "worse loss"
    assert said(by_task, nothing) == "not told apart"
    assert said(paired({("a", 0): 0.5}), nothing) == "not told apart"  # one cell has no standard error


def test_a_spectrum_of_one_start_is_steep_and_random_directions_keep_the_singular_values():
    torch.manual_seed(0)
    shared = torch.randn(2, 32)
    adapters = [
        LoraAdapter.from_factors(str(i), {"q": LoraFactors(A=shared, B=torch.randn(24, 2), scale=1.0)}, base="b")
        for i in range(6)
    ]
    found, null = spectrum(adapters), spectrum(turned(adapters))
    assert found["rows"] == 12 and found["directions"][1] == 2
    assert found["in"]["mean"][1] == pytest.approx(1.0)  # two rows are all there is
    assert null["in"]["mean"][1] < 0.9 and found["out"]["mean"][1] < 0.9
    for before, after in zip(adapters, turned(adapters), strict=True):
        values = [torch.linalg.svdvals(f.scale * f.B @ f.A) for f in (before.factors("q"), after.factors("q"))]
        assert torch.allclose(*values, atol=1e-4)
