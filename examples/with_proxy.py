"""Experts as PEFT adapters, the router as what chooses one for a prompt, and the engine's request."""

import tempfile
from pathlib import Path

import small_model

import moe_rewrite
from moe_rewrite.serve import AdapterRouter, lora_request, requested

moe = moe_rewrite.convert(small_model.model(), split=1)
moe.rename(0, "law")
with tempfile.TemporaryDirectory() as made:
    served = Path(made) / "served"
    moe.save_adapters(served, tokenizer=small_model.tokenizer())
    print(sorted(p.name for p in served.iterdir()))
    router = AdapterRouter.load(served)
    weights = router.weights("w3 w4 w5")
    print(router.choose("w3 w4 w5"), weights)
    print(requested({"prompt": "w3 w4 w5"}, weights, "vllm", "my-llama", router.names))
    print(requested({"prompt": "w3 w4 w5"}, weights, "llama.cpp", "my-llama", router.names))
    print(lora_request("law", router.names, served)["lora_name"])
