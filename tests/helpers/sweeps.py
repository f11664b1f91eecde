"""Slow sweeps: a few of their cases in every run, the others with ``pytest -m sweep``."""

import pytest


def some(names, few):
    """All names as cases of a test; those that are not among the few are marked."""
    return [name if name in few else pytest.param(name, marks=pytest.mark.sweep) for name in names]
