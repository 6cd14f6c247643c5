"""Run by torchrun in two processes: train a sparse adapter on halves of each batch, write the values of rank 0."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))

from adapterbank.shira import ShiraTunerConfig, calibrate
from tiny_models import llama

out = sys.argv[1]
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
rows = torch.randint(3, 50, (3, 4, 6), generator=torch.Generator().manual_seed(2))
model = get_peft_model(llama(), ShiraTunerConfig(density=0.05, mask="snip", target_modules=["q_proj", "v_proj"]))
# each process sees other batches: the first one's positions are everybody's
calibrate(model, [{"input_ids": rows[rank], "labels": rows[rank]}])
wrapped = DistributedDataParallel(model)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
for batch in rows:
    mine = batch[rank::world]
    wrapped(input_ids=mine, labels=mine).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
if rank == 0:
    torch.save({"state": {n: t for n, t in model.state_dict().items() if "sparse_" in n}, "rows": rows}, out)
dist.destroy_process_group()
