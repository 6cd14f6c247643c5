import os
import subprocess
import sys
from pathlib import Path

import torch
from peft import get_peft_model

from adapterbank.shira import ShiraTunerConfig, calibrate
from tiny_models import llama


def test_two_processes_train_what_one_trains(tmp_path):
    script, out = Path(__file__).with_name("ddp_script.py"), tmp_path / "values.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(script), str(out)],
        capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = torch.load(out, weights_only=True)
    rows = found["rows"]
    model = get_peft_model(llama(), ShiraTunerConfig(density=0.05, mask="snip", target_modules=["q_proj", "v_proj"]))
    calibrate(model, [{"input_ids": rows[0], "labels": rows[0]}])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for batch in rows:
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = model.state_dict()
    assert found["state"]
    for name, value in found["state"].items():
        torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-4)
