"""A pipeline on a converted model, one expert chosen, and that expert merged into a dense model."""

import small_model
from transformers import pipeline

import moe_rewrite

moe = moe_rewrite.convert(small_model.model(), split=1)
generate = pipeline("text-generation", model=moe, tokenizer=small_model.tokenizer())
print(generate("w3 w4 w5", max_new_tokens=4, do_sample=False))
with moe.use_expert("expert0"):
    print(generate("w3 w4 w5", max_new_tokens=4, do_sample=False))
dense = moe.merge_expert("expert0")  # a LlamaForCausalLM
print(type(dense).__name__, sum(p.numel() for p in dense.parameters()))
