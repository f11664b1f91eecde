"""Pipeline parallel, the frozen half in one process and the deep half in the other: torchrun
--nproc-per-node 2 examples/with_pipeline_stages.py."""

import small_model
import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

import moe_rewrite
from moe_rewrite import TokenRouter

dist.init_process_group("gloo")  # "nccl" on GPUs
rank = dist.get_rank()
router = TokenRouter(granularity="prefix", fit="gradient")
moe = moe_rewrite.convert(small_model.model(), split=1, router=router).train()
stage = PipelineStage(moe.pipeline_stages()[rank], rank, 2, torch.device("cpu"))


def loss(logits, labels):
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


schedule = ScheduleGPipe(stage, 2, loss_fn=loss)
optimizer = torch.optim.AdamW(moe.trainable_parameters(), lr=1e-2)
for rows in small_model.batches(small_model.texts()):
    losses = []
    if rank == 0:
        schedule.step(input_ids=rows)
    else:
        schedule.step(input_ids=rows, target=rows, losses=losses)
        optimizer.step()
        optimizer.zero_grad()
        print("loss", torch.stack(losses).mean().item())
dist.destroy_process_group()
