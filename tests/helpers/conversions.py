"""Conversions that several tests start from: made once, since that is slow, and copied."""

import copy
from functools import cache

import moe_rewrite


def fresh(model, **options):
    """A copy of the one conversion of this model with these options."""
    return copy.deepcopy(_converted(model, tuple(sorted(options.items(), key=lambda o: o[0]))))


@cache
def _converted(model, options):
    return moe_rewrite.convert(model, **dict(options))
