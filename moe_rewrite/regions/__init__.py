"""Regions of convolutions that experts run on patches: their code, and the call in their place."""
