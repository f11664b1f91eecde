"""Measurements: ``python -m benchmarks.FOLDER.NAME [--quick]`` ends with a line of JSON."""
