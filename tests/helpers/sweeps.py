"""Slow sweeps: a few of their cases in every run, the others with ``pytest -m sweep``."""

import pytest


def some(names, few):
    """All names as cases of a test; those not in `few` are marked as a sweep."""
    return [name if name in few else pytest.param(name, marks=pytest.mark.sweep) for name in names]
