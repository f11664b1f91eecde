"""DistributedDataParallel: torchrun --nproc-per-node 2 examples/with_ddp.py."""

import tempfile

import small_model
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import moe_rewrite

dist.init_process_group("gloo")  # "nccl" on GPUs
part = small_model.texts()[dist.get_rank() :: dist.get_world_size()]
moe = moe_rewrite.convert(small_model.model(), split=1)  # the same model in all processes
moe.remember(texts=32, length=8)  # what it could do before
print("loss", small_model.train(DistributedDataParallel(moe), part))
moe.expand(name="second")  # in all processes; then wrap again, with an optimizer of its own
print("loss", small_model.train(DistributedDataParallel(moe), part))
moe.eval()
moe.save_pretrained(tempfile.mkdtemp())  # in all processes; the first one writes
dist.destroy_process_group()
