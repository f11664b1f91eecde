"""Blocks that are alike: traced once, copied for the others."""
