import json
from dataclasses import replace

import pytest

from adapterbank.demo.assets import cache_dir
from adapterbank.demo.train import TrainSettings
from adapterbank.demo.workers import run_jobs, train

SETTINGS = [TrainSettings(task="pc-mac", seed=seed) for seed in range(3)]


@pytest.fixture
def cached(monkeypatch, tmp_path):
    """A cache in which all of ``SETTINGS`` have been trained."""
    monkeypatch.setenv("ADAPTERBANK_CACHE", str(tmp_path))
    folders = [cache_dir() / "adapters" / f"pc-mac-{settings.key()}" for settings in SETTINGS]
    for settings, folder in zip(SETTINGS, folders, strict=True):
        folder.mkdir(parents=True)
        (folder / "meta.json").write_text(json.dumps({"key": settings.key()}))
    return folders


def test_results_come_in_the_order_of_the_jobs(cached):
    assert run_jobs(train, SETTINGS) == cached


def test_a_failing_job_ends_the_run_with_its_own_error(cached):
    jobs = [SETTINGS[0], replace(SETTINGS[1], task="mnist"), SETTINGS[2]]
    with pytest.raises(KeyError, match="no task 'mnist'"):
        run_jobs(train, jobs)
