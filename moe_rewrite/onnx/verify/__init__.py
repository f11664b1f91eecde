"""Proof of an exported file against PyTorch."""
