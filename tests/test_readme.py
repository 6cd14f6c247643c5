"""The README's Python runs as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from families import make_family

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_python_example_runs(page, tmp_path):
    block = re.search(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    made = make_family(tmp_path, n=3, rank=8, hidden=256, layers=2, shared_rank=16)
    (tmp_path / "adapters").mkdir()
    for directory, name in zip(made, ("law", "news", "sports"), strict=True):
        Path(directory).rename(tmp_path / "adapters" / name)
    # a process of its own, without the tests' shape checks: they refuse the int that a reader writes for a float
    done = subprocess.run([sys.executable, "-c", block[1]], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "restored" / "law" / "adapter_model.safetensors").is_file()
