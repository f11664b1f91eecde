"""Hold the shallow segment in evaluation: no dropout and no batch statistics before the cut.

Exact with respect to the original with its shallow part in eval mode. Modules that run only before
the cut are captured in eval mode already; this catches what a module around the cut does itself.
"""

from __future__ import annotations

import torch
from torch import fx

from ..errors import CaptureError
from ..ir.program import Program
from .clean import DROPOUTS
from .split import segments

aten = torch.ops.aten
OFF = {  # operator -> (position of the argument, the value it has in evaluation)
    **dict.fromkeys(DROPOUTS, (2, False)),
    aten.scaled_dot_product_attention.default: (4, 0.0),
    aten.batch_norm.default: (5, False),
    aten.rrelu.default: (3, False),
}


def freeze(program: Program) -> Program:
    """Raises CaptureError where the shallow segment draws random numbers that cannot be held."""
    shallow, _ = segments(program)
    held = False
    for node in shallow:
        if node.target in OFF:
            at, evaluated = OFF[node.target]
            if len(node.args) > at and node.args[at] != evaluated:
                held = True
                node.args = (*node.args[:at], evaluated, *node.args[at + 1 :])
        elif program.mode == "train" and _is_random(node):
            raise CaptureError(
                f"{node.target} draws random numbers before the cut in training mode; the shallow "
                "segment stays in evaluation: split before it"
            )
    return program.after("freeze", "exact", held=held)


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
