"""FSDP2, block by block, and a distributed checkpoint: torchrun --nproc-per-node 2
examples/with_fsdp2.py."""

import tempfile

import small_model
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoints
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import moe_rewrite

dist.init_process_group("gloo")  # "nccl" on GPUs
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
part = small_model.texts()[dist.get_rank() :: dist.get_world_size()]
moe = moe_rewrite.convert(small_model.model(), split=1)  # the same model in all processes
moe.remember(texts=32, length=8)  # what it could do before
for block in (*moe.shallow, *moe.deep):
    fully_shard(block, mesh=mesh)
fully_shard(moe, mesh=mesh)
print("loss", small_model.train(moe, part))
moe.expand(name="second")  # in all processes; sharded like the rest
print("loss", small_model.train(moe, part))
moe.eval()
folder = [tempfile.mkdtemp()]
dist.broadcast_object_list(folder)  # the first process's
checkpoints.save(get_model_state_dict(moe), checkpoint_id=f"{folder[0]}/checkpoint")
moe.save_pretrained(f"{folder[0]}/experts")  # what one process would write
dist.destroy_process_group()
