"""Experts on a base that torchao has quantised to int8."""

import tempfile

import small_model
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import moe_rewrite

dense = small_model.model()
quantize_(dense, Int8WeightOnlyConfig())
moe = moe_rewrite.convert(dense, split=1)
moe.remember(texts=32, length=8)  # what it could do before
print("loss", small_model.train(moe, small_model.texts()))
moe.eval()
moe.save_pretrained(tempfile.mkdtemp())  # the experts; they load onto a base quantised alike
