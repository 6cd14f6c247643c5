"""Run a job of ``benchmarks.fresh`` in a fresh process: its CPU seconds, its peak memory, and what it reports."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_fresh(job: str, folder: Path, out: Path, **arguments: Any) -> dict[str, Any]:
    """What the job printed, with ``cpu_seconds`` (user and system, start-up included) and ``peak_mb``.

    Raises:
        RuntimeError: If the job failed.
    """
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "benchmarks.fresh",
        job,
        str(folder),
        str(out),
        json.dumps(arguments),
    ]
    # one thread for everybody: CPU seconds of a spinning thread pool say nothing
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stdout is not None
    printed = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{job} ended with exit code {process.returncode}")
    # the last line: peers talk
    return {**json.loads(printed.splitlines()[-1]), "cpu_seconds": usage.ru_utime + usage.ru_stime}
