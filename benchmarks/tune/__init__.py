"""Choice of the package's constants and of the other benchmarks' learning rates."""
