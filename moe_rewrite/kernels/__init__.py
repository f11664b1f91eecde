"""Fused operations: plain PyTorch, the CPU, and Triton."""
