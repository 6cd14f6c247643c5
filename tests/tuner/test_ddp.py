import os
import subprocess
import sys
from pathlib import Path

import torch
from peft import get_peft_model

from adapterbank.tuner import optimizer_groups
from tiny_models import eigen, llama


def test_two_processes_train_what_one_trains(bank_dir, tmp_path):
    script, out = Path(__file__).with_name("ddp_script.py"), tmp_path / "weights.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(script), str(bank_dir), str(out)],
        capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = torch.load(out, weights_only=True)
    model = get_peft_model(llama(), eigen(bank_dir, task_type="CAUSAL_LM"))
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name, value in found["start"].items():
        parameters[name].data.copy_(value)
    optimizer = torch.optim.AdamW(optimizer_groups(model))
    for batch in found["rows"]:
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in found["end"].items():
        torch.testing.assert_close(parameters[name].detach(), value, rtol=1e-3, atol=1e-4)
