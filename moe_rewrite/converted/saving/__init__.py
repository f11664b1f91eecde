"""Saves of a converted model: its own form, adapters, checkpoints of other classes."""
