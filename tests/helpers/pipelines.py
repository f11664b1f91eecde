"""All passes of a conversion as one list."""

from moe_rewrite.passes.pipeline import TO_CUT, to_experts, to_sites


def all_passes(recipe, router):
    """From a captured graph to one with experts."""
    return (*TO_CUT, *to_sites(recipe), *to_experts(recipe, router))
