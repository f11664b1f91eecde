"""Hold the shallow segment in evaluation: no dropout before the cut, whatever emitted it.

Exact with respect to the original with its shallow part in eval mode. Modules that run only before
the cut are captured in eval mode already; this catches functional dropout in a module around it.
"""

from __future__ import annotations

from ..program import Program
from .clean import DROPOUTS
from .split import segments


def freeze(program: Program) -> Program:
    shallow, _ = segments(program)
    for node in shallow:
        if node.target in DROPOUTS:
            node.args = (*node.args[:2], False)
    return program.after("freeze", "exact")
