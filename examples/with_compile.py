"""torch.compile, block by block, in training and in evaluation."""

import small_model
import torch

import moe_rewrite

moe = moe_rewrite.convert(small_model.model(), split=1)
moe.remember(texts=32, length=8)  # what it could do before
moe.compile(dynamic=True)
print("loss", small_model.train(moe, small_model.texts()))
moe.eval()
rows = next(small_model.batches(small_model.texts()))
with torch.no_grad():
    for length in (5, 7, 9):
        print(moe(input_ids=rows[:, :length]).logits.shape)
