"""The layers, files and kernels that the benchmarks of speed/ measure, in their different forms."""
