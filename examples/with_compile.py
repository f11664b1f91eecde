"""torch.compile, block by block, in training and in evaluation."""

import small_model
import torch

import moe_rewrite

moe = moe_rewrite.convert(small_model.model(), split=1)
moe.remember(texts=32, length=8)  # what it could do before
moe.compile(dynamic=True)
optimizer = torch.optim.AdamW(moe.trainable_parameters(), lr=1e-2)
moe.train()
for rows in small_model.batches(small_model.texts()):
    loss = moe(input_ids=rows, labels=rows).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
moe.eval()
with torch.no_grad():
    for length in (5, 7, 9):
        print(moe(input_ids=rows[:, :length]).logits.shape)
