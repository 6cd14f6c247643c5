"""Run by torchrun in two processes: train on halves of each batch, write the weights of rank 0."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))

from adapterbank.tuner import optimizer_groups
from tiny_models import eigen, llama

bank, out = sys.argv[1], sys.argv[2]
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(rank)  # differs on purpose: the first process's coefficients are everybody's
model = get_peft_model(llama(), eigen(bank, task_type="CAUSAL_LM"))
wrapped = DistributedDataParallel(model)
shared = {id(b) for n, b in model.named_buffers() if ".shared_" in n}
assert shared, "no basis to be left alone"
assert shared.isdisjoint(map(id, wrapped.modules_buffers)), "the basis would be sent at every step"
start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
optimizer = torch.optim.AdamW(optimizer_groups(model))
rows = torch.randint(3, 50, (3, 4, 6), generator=torch.Generator().manual_seed(2))
for batch in rows:
    mine = batch[rank::world]
    wrapped(input_ids=mine, labels=mine).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
if rank == 0:
    end = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    torch.save({"start": start, "end": end, "rows": rows}, out)
dist.destroy_process_group()
