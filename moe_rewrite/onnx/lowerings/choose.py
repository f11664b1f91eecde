"""Choose a site's lowering, with the reason; "auto" chooses from a table of measured times."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ..trace.ffn_placeholder import Routing, TracedFeedForward
from .contrib import misfit

LOWERINGS = ("auto", "dense", "sparse", "contrib")
TABLE = Path(__file__).with_name("measured.json")


@dataclass(frozen=True)
class Chosen:
    lowering: str
    why: str


@dataclass(frozen=True)
class Choice:
    """The options by which each site's lowering is chosen.

    asked: one of LOWERINGS.
    bits: of quantized weights, 4 or 8; None without quantization.
    open: the number of experts may change.
    """

    asked: str
    bits: int | None = None
    open: bool = False

    def of(self, call: TracedFeedForward, routing: Routing) -> Chosen:
        """The site's lowering. Raises ConfigError, with the reason, if the one asked for does not
        fit."""
        if self.open:
            return Chosen(
                "open", "their number may change: one after the other, each on its own rows"
            )
        reason = misfit(call, routing)
        if self.bits is not None:
            if reason or self.asked not in ("auto", "contrib"):
                raise ConfigError(
                    f"int{self.bits} weights of {call.name}: only com.microsoft.QMoE takes them"
                    f" ({reason or f'lowering={self.asked!r} asked for'}); leave dtype at None"
                )
            return Chosen("contrib", f"int{self.bits} weights")
        if self.asked == "auto":
            return _measured(routing, reason)
        if self.asked == "contrib" and reason:
            raise ConfigError(
                f"lowering='contrib' for {call.name}: {reason}; use 'sparse', 'dense' or 'auto'"
            )
        return Chosen(self.asked, "asked for")


def _measured(routing: Routing, misfit: str) -> Chosen:
    if routing.top_k is None:
        return Chosen(
            "sparse", f"not measured for experts that choose rows; contrib does not fit: {misfit}"
        )
    if routing.top_k >= routing.experts:
        return Chosen("dense", "every row goes to all experts")
    able = tuple(n for n in LOWERINGS[1:] if not (misfit and n == "contrib"))
    best, worst = fastest(table(), routing.experts, routing.top_k, able)
    ratios = ", ".join(f"{n} {r:.2f}" for n, r in worst.items())
    rest = f"; contrib does not fit: {misfit}" if misfit else ""
    return Chosen(best, f"worst ratio to the fastest, as measured: {ratios}{rest}")


def fastest(
    cells: list[dict[str, Any]], experts: int, top_k: int, able: tuple[str, ...]
) -> tuple[str, dict[str, float]]:
    """(best lowering, each lowering's worst ratio to the fastest over numbers of rows and shapes).

    Uses the cells that are nearest in numbers of experts and choices; the best lowering is the one
    with the smallest worst ratio.
    """

    def far(cell: dict[str, Any]) -> float:
        return abs(math.log(cell["experts"] / experts)) + abs(math.log(cell["top_k"] / top_k))

    nearest = min(far(c) for c in cells)
    times = [c["milliseconds"] for c in cells if far(c) == nearest]
    worst = {n: max(c[n] / min(c[a] for a in able) for c in times) for n in able}
    return min(worst, key=lambda n: worst[n]), worst


@cache
def table() -> list[dict[str, Any]]:
    """Cells of experts, top_k, rows and milliseconds by lowering, from `benchmarks.speed.onnx`."""
    return json.loads(TABLE.read_text())["cells"]
