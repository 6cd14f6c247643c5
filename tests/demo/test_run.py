import json
from functools import partial
from io import StringIO

import pytest
from peft import PeftModel
from rich.console import Console

from adapterbank.bank import Bank
from adapterbank.demo import run, workers
from adapterbank.demo.run import demo_settings, print_result, progress_bars, run_demo
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
    monkeypatch.setattr(workers, "load_classifier", tiny.classifier)
    monkeypatch.setattr(workers, "load_tokenizer", lambda: tiny.tokenize)
    monkeypatch.setattr(workers, "load_task", tiny.task)
    return partial(run_demo, tiny.folder / "out", adapters=2, ratio=4.0)


def test_the_demo_leaves_adapters_bank_restored_adapters_and_pictures(tiny_demo, tiny):
    stages = []
    result = tiny_demo(progress=lambda stage, done, total: stages.append(stage))
    out = tiny.folder / "out"
    assert Bank.load(out / "bank").errors() == {row.adapter: row.error for row in result.rows}
    assert Bank.load(out / "bank").verify([out / "adapters" / row.adapter for row in result.rows]) == pytest.approx(
        {row.adapter: row.error for row in result.rows}, rel=1e-4
    )
    for row in result.rows:
        PeftModel.from_pretrained(tiny.classifier(2), out / "restored" / row.adapter)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in result.pictures)
    assert json.loads((out / "result.json").read_text())["ratio"] == result.ratio
    assert {"train adapters", "measure accuracies"} <= set(stages)


def test_a_second_demo_replaces_the_first(tiny_demo):
    first, second = tiny_demo(), tiny_demo()
    assert [row.error for row in first.rows] == [row.error for row in second.rows]


def test_the_table_shows_what_was_measured(tiny_demo):
    result, text = tiny_demo(), StringIO()
    print_result(result, Console(file=text, width=160))
    for row in result.rows:
        line = next(line for line in text.getvalue().splitlines() if row.adapter in line)
        cells = (f"{row.stored_bytes:,}", f"{row.bank_bytes:,}", f"{row.error:.3f}", f"{row.accuracy_after:.3f}")
        assert all(cell in line for cell in cells)
    assert f"{result.bank_bytes:,}" in text.getvalue()


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


def test_bars_are_silent_where_there_is_no_terminal():
    text = StringIO()
    with progress_bars(Console(file=text)) as tell:
        tell("train adapters", 1, 2)
    assert text.getvalue() == ""
