"""Experts on a base that torchao has quantised to int8."""

import tempfile

import small_model
import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import moe_rewrite

dense = small_model.model()
quantize_(dense, Int8WeightOnlyConfig())
moe = moe_rewrite.convert(dense, split=1)
moe.remember(texts=32, length=8)  # what it could do before
optimizer = torch.optim.AdamW(moe.trainable_parameters(), lr=1e-2)
moe.train()
for rows in small_model.batches(small_model.texts()):
    loss = moe(input_ids=rows, labels=rows).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print("loss", loss.item())
moe.eval()
moe.save_pretrained(tempfile.mkdtemp())  # the experts; they load onto a base quantised alike
