import json
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path

import pytest
from peft import PeftModel
from rich.console import Console

from adapterbank.bank import Bank
from adapterbank.demo import newtask, run, workers
from adapterbank.demo.data import TASKS
from adapterbank.demo.newtask import NewTaskRow
from adapterbank.demo.run import DemoResult, Row, demo_settings, print_result, run_demo
from adapterbank.errors import AdapterBankError

# PEFT 0.21 still asks transformers 5 for a name that it renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def in_this_process(function, jobs, *, progress=None):
    results = [function(job, lambda share: None) for job in jobs]
    if progress is not None:
        progress(float(len(jobs)), len(jobs))
    return results


@pytest.fixture
def tiny_demo(tiny, monkeypatch):
    """The whole demo on the tiny model, without downloads and worker processes."""
    monkeypatch.setattr(run, "_download", lambda tell: None)
    monkeypatch.setattr(run, "run_jobs", in_this_process)
    monkeypatch.setattr(run, "RATIOS", (4.0,))
    for module in (workers, newtask):
        monkeypatch.setattr(module, "load_classifier", tiny.classifier)
    monkeypatch.setattr(workers, "load_tokenizer", lambda: tiny.tokenize)
    monkeypatch.setattr(workers, "load_task", tiny.task)
    return partial(run_demo, tiny.folder / "out", adapters=2, ratio=4.0)


def test_the_demo_leaves_adapters_bank_restored_adapters_and_pictures(tiny_demo, tiny):
    out = tiny.folder / "out"
    (out / "adapters" / "of-an-earlier-demo").mkdir(parents=True)
    (out / ".adapterbank-demo").touch()
    stages = []
    result = tiny_demo(progress=lambda stage, done, total: stages.append(stage))
    assert {folder.name for folder in (out / "adapters").iterdir()} == {row.adapter for row in result.rows}
    assert Bank.load(out / "bank").errors() == {row.adapter: row.error for row in result.rows}
    assert Bank.load(out / "bank").verify([out / "adapters" / row.adapter for row in result.rows]) == pytest.approx(
        {row.adapter: row.error for row in result.rows}, rel=1e-4
    )
    for row in result.rows:
        PeftModel.from_pretrained(tiny.classifier(2), out / "restored" / row.adapter)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in result.pictures)
    assert json.loads((out / "result.json").read_text())["ratio"] == result.ratio
    assert {"train adapters", "measure accuracies", "train a new task"} <= set(stages)


def test_the_new_task_is_none_of_the_banks_and_trained_in_three_ways(tiny_demo, tiny):
    out = tiny.folder / "out"
    result = tiny_demo()
    assert result.new_task == TASKS[2] and result.new_task not in {row.adapter for row in result.rows}
    assert {row.method for row in result.new_task_rows} == {folder.name for folder in (out / "new-task").iterdir()}
    bank, lora, head = result.new_task_rows
    assert (head.trained, head.stored_bytes) == (0, 0)
    assert bank.bank_bytes is not None and lora.bank_bytes is None
    # it was a member in memory only
    assert Bank.load(out / "bank").names == [row.adapter for row in result.rows]
    assert [row["method"] for row in json.loads((out / "result.json").read_text())["new_task_rows"]] == list(
        newtask.METHODS
    )


def test_of_all_tasks_the_last_one_is_held_out(tiny_demo, monkeypatch):
    monkeypatch.setattr(run, "TASKS", TASKS[:3])
    result = tiny_demo(adapters=3)
    assert [row.adapter for row in result.rows] == list(TASKS[:2]) and result.new_task == TASKS[2]


def test_the_table_shows_what_was_measured():
    sizes = {"stored_bytes": 1_327_104, "bank_bytes": 80_123}
    row = Row(adapter="pc-mac", error=0.1234, accuracy_before=0.81, accuracy_after=0.79, **sizes)
    result = DemoResult(
        rows=[row, replace(row, adapter="tweets", accuracy_after=0.83)],
        test_examples=321,
        bank_bytes=170_001,
        ratio=15.61,
        error=0.2345,
        new_task="med-space",
        new_task_rows=[
            NewTaskRow(
                method="bank", accuracy=0.934, trained=18_432, stored_bytes=123_456, bank_bytes=54_321, bank_error=0.187
            ),
            NewTaskRow(method="head", accuracy=0.871, trained=0, stored_bytes=0, bank_bytes=None, bank_error=None),
        ],
        bank_points=[],
        baseline_points={},
        seconds=12.0,
        bank=Path("out/bank"),
        pictures=[Path("out/a.png")],
    )
    text = StringIO()
    print_result(result, Console(file=text, width=160))
    lines = text.getvalue().splitlines()
    assert all(cell in next(x for x in lines if "pc-mac" in x) for cell in ("1,327,104", "80,123", "0.123", "0.790"))
    assert all(cell in next(x for x in lines if "all, " in x) for cell in ("2,654,208", "170,001", "0.234", "0.810"))
    line = next(x for x in lines if "in the bank" in x)
    assert all(cell in line for cell in ("18,432", "123,456", "54,321", "0.187", "0.934"))
    assert "A new task, med-space" in text.getvalue() and "the head alone" in text.getvalue()
    assert "15.6x" in text.getvalue() and "321 test texts" in text.getvalue() and "out/a.png" in text.getvalue()


@pytest.mark.parametrize("adapters", [1, 13])
def test_an_impossible_number_of_adapters_is_refused(tmp_path, adapters):
    with pytest.raises(AdapterBankError, match=rf"adapters={adapters} is outside \[2, 12\]"):
        run_demo(tmp_path / "out", adapters=adapters)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_somebody_else_is_left_alone(tiny_demo, tiny):
    theirs = tiny.folder / "out" / "adapters" / "mine"
    theirs.mkdir(parents=True)
    with pytest.raises(AdapterBankError, match="no earlier demo's; give a new or empty directory"):
        tiny_demo()
    assert theirs.exists()


def test_no_two_adapters_of_a_demo_share_a_start():
    settings = [s for seed in range(3) for s in demo_settings(12, seed)]
    assert len({s.init_seed for s in settings}) == len(settings)
