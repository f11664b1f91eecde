"""Find the depth of the model: its cut points and the blocks between them."""

from __future__ import annotations

from ..analysis.depth import depth_map
from ..ir.program import Program


def find_depth(program: Program, model: str, split: object = None) -> Program:
    """Record the depth map. Exact: the graph is only read."""
    return program.after("depth", "exact", depth=depth_map(program, model, split))
