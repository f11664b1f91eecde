"""Checkpoints of transformers' own mixture-of-experts classes."""
