"""Measurements: ``python -m benchmarks.NAME [--quick]`` prints a table and a last line of JSON."""
