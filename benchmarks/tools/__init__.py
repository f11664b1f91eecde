"""Shared by all benchmarks: timing, memory, data, models, the report, plots."""
