"""Key-value caches of transformers, as inputs and outputs of a graph."""
