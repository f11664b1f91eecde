"""Tensor parallel: torchrun --nproc-per-node 2 examples/with_tensor_parallel.py."""

import tempfile

import small_model
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import moe_rewrite

dist.init_process_group("gloo")  # "nccl" on GPUs
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
moe = moe_rewrite.convert(small_model.model(), split=1)  # the same model in all processes
moe.tensor_parallel(mesh)  # dense weights by the model's plan; experts stay whole
moe.remember(texts=32, length=8)  # what it could do before
optimizer = torch.optim.AdamW(moe.trainable_parameters(), lr=1e-2)
moe.train()
for rows in small_model.batches(small_model.texts()):  # the same in all processes
    loss = moe(input_ids=rows, labels=rows).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
moe.eval()
tokens = moe.generate(rows[:1, :4], max_new_tokens=4, do_sample=False)
print("loss", loss.item(), tokens.tolist())
moe.save_pretrained(tempfile.mkdtemp())  # in all processes; the first one writes
dist.destroy_process_group()
