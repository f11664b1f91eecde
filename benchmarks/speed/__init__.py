"""Benchmarks of speed and memory. The forms that they measure are in forms/."""
