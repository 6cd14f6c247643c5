import json

import pytest
from benchmarks.adaptation import analysis, results
from benchmarks.adaptation.analysis import Part, paired, reached
from benchmarks.adaptation.methods import Method
from benchmarks.adaptation.runs import Run
from benchmarks.adaptation.sources import Recycled

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
