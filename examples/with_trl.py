"""TRL's SFTTrainer, with several texts packed into a row."""

import tempfile

import small_model
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import moe_rewrite

moe = moe_rewrite.convert(small_model.model(), split=1)
moe.remember(texts=32, length=8)  # what it could do before, as texts that it writes itself
texts = Dataset.from_dict({"text": ["w3 w4 w5 w6", "w7 w8", "w9 w10 w11 w12"] * 4})
options = SFTConfig(
    tempfile.mkdtemp(), packing=True, max_length=16, max_steps=2, logging_steps=1, use_cpu=True,
    bf16=False, report_to=[],
)  # fmt: skip
trainer = SFTTrainer(moe, options, train_dataset=texts, processing_class=small_model.tokenizer())
trainer.train()
