"""LoRA experts of linear maps and convolutions."""
