import pytest
from benchmarks.adaptation import results
from benchmarks.adaptation.sparse import page
from benchmarks.adaptation.sparse.fused import Fused, fusions
from benchmarks.adaptation.sparse.page import sections

TASKS = ("intent", "tweets")


def trained(name, task, seed, *, lr=1e-2, loss=0.5, accuracy=0.8):
    return {
        "key": f"{name}{task}{seed}{lr}",
        "part": "sparse",
        "task": task,
        "seed": seed,
        "steps": 80,
        "sources": None,
        "method": {"name": name, "lr": lr, "head_lr": 3e-3},
        "result": {"accuracy": accuracy, "trained": 10, "validation": [[0, 1.0, 0.5], [80, loss, 0.7]]},
    }


def fusion(name, seed, *, single, fused):
    asked = {"single": {"accuracy": single, "test_loss": 0.5}, "fused": {"accuracy": fused, "test_loss": 0.6}}
    pair = {"tasks": list(TASKS), "overlap": 0.5, "awom": 1.0, "awor": 0.9, "distance": 1.0}
    result = {"tasks": dict.fromkeys(TASKS, asked), "pairs": [pair]}
    return {"key": f"{name}{seed}", "part": "sparse-fusion", "name": name, "seed": seed, "result": result}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")


def test_a_method_counts_at_its_best_rate():
    for name, loss in ((page.EQUAL, 0.5), ("wm", 0.4)):
        for task in TASKS:
            results.append(trained(name, task, 0, loss=loss, accuracy=0.9))
            results.append(trained(name, task, 0, lr=3e-2, loss=loss + 0.1, accuracy=0.1))
    part = page.compared()
    assert part.mean("wm") == pytest.approx(0.9)
    assert part.loss_difference("wm", page.EQUAL).mean == pytest.approx(-0.1)


def test_a_drop_is_single_minus_fused_in_points():
    lines = [fusion("wm, one mask", seed, single=0.9, fused=0.8 - 0.1 * seed) for seed in (0, 1)]
    drops = Fused(lines).drops
    assert drops["intent", 0] == pytest.approx(10)
    assert drops["tweets", 1] == pytest.approx(20)


def test_a_fusion_counts_when_it_has_every_seed():
    lines = [fusion("a", seed, single=0.9, fused=0.8) for seed in (0, 1)]
    assert list(fusions([*lines, fusion("b", 0, single=0.9, fused=0.8)])) == ["a"]


def test_the_page_has_a_section_for_each_question():
    for name in (page.EQUAL, *page.MASKS):
        for task in TASKS:
            for seed in (0, 1):
                results.append({**trained(name, task, seed), "result": _measured(seed)})
    for seed in (0, 1):
        for name in (page.EQUAL, "wm, one mask", "wm, own masks"):
            results.append(fusion(name, seed, single=0.9, fused=0.8 - 0.1 * seed))
    points = [{"alpha": alpha, "test_loss": 1 - alpha / 2, "accuracy": 0.5} for alpha in (0.0, 1.0)]
    swept = {"base": {"test_loss": 1.0, "accuracy": 0.5}, "points": points}
    adapter = {"task": "intent", "method": {"name": "wm"}}
    results.append({"key": "s", "part": "sparse-strength", "adapter": adapter, "result": swept})
    text = "\n".join(sections())
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Masks on real tasks",
        "## Three adapters in one model",
        "## Strength",
    ]
    assert "in 1 of 1 cases" in text
    assert "wm +0.0 ± 0.0" in text


def _measured(seed):
    return {"accuracy": 0.8 + 0.01 * seed, "test_loss": 0.5, "trained": 10, "validation": [[80, 0.5, 0.7]]}


def test_there_is_no_section_without_results():
    assert sections() == []
