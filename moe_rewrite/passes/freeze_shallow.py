"""Put the shallow segment in eval mode: no dropout and no batch statistics before the cut.

Exact with respect to the original with its shallow part in eval mode. Modules that run only before
the cut are captured in eval mode already; this covers operations of modules that contain the cut.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import CaptureError
from ..ir.ops import argument, evaluation, is_random, set_argument
from ..ir.program import Program
from .base import Decisions, Pass
from .split import segments


@dataclass(frozen=True)
class FreezeShallow(Pass):
    """Raises CaptureError if the shallow segment draws random numbers that cannot be turned off."""

    name = "freeze"

    def apply(self, program: Program, decisions: Decisions) -> Program:
        shallow, _ = segments(program)
        reruns = False
        for node in shallow:
            evaluated = evaluation(node)
            off = {n: v for n, v in evaluated.items() if argument(node, n) != v}
            for name, setting in off.items():
                set_argument(node, name, setting)
            reruns |= bool(off)
            if not evaluated and program.mode == "train" and is_random(node):
                raise CaptureError(
                    f"{node.target} draws random numbers before the cut in training mode; the "
                    "shallow segment stays in eval mode: split before it"
                )
        return self.done(program, shallow_reruns=reruns)
