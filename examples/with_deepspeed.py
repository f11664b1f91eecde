"""DeepSpeed's ZeRO stage 3: torchrun --nproc-per-node 2 examples/with_deepspeed.py."""

import tempfile

import deepspeed
import small_model
import torch
import torch.distributed as dist

import moe_rewrite

deepspeed.init_distributed("gloo")  # "nccl" on GPUs
moe = moe_rewrite.convert(small_model.model(), split=1)  # the same model in all processes
moe.remember(texts=32, length=8)  # what it could do before
optimizer = torch.optim.AdamW(moe.trainable_parameters(), lr=1e-2)
config = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 3},
    "zero_allow_untested_optimizer": True,
}
engine, *_ = deepspeed.initialize(model=moe.train(), optimizer=optimizer, config=config)
part = small_model.texts()[dist.get_rank() :: dist.get_world_size()]
for rows in small_model.batches(part):
    loss = engine(input_ids=rows, labels=rows).loss
    engine.backward(loss)
    engine.step()
print("loss", loss.item())
moe.eval()  # in all processes, and so is the save
moe.save_pretrained(tempfile.mkdtemp())
dist.destroy_process_group()
