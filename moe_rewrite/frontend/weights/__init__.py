"""A model's tensors: copies of its structure, quantised, divided or partial ones."""
