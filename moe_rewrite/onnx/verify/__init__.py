"""Verification of an exported file against PyTorch."""
