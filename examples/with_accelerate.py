"""accelerate alone: a loop of one's own, with a loss on the routing, saved and read again."""

import tempfile

import small_model
import torch
from accelerate import Accelerator

import moe_rewrite
from moe_rewrite import TokenRouter

router = TokenRouter(granularity="prefix", fit="gradient")  # one that a loss can train
moe = moe_rewrite.convert(small_model.model(), split=1, router=router)
accelerator = Accelerator(cpu=True)
optimizer = torch.optim.AdamW(moe.trainable_parameters(), lr=1e-2)
loader = torch.utils.data.DataLoader(small_model.texts(), batch_size=4)
model, optimizer, loader = accelerator.prepare(moe, optimizer, loader)
model.train()
for batch in loader:
    outputs, plan = accelerator.unwrap_model(model).with_plan(**batch)
    loss = outputs.loss + 0.01 * plan.load_balance_loss()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
print("loss", outputs.loss.item())
folder = tempfile.mkdtemp()
accelerator.save_state(folder)
accelerator.load_state(folder)
moe.save_pretrained(f"{folder}/experts")
