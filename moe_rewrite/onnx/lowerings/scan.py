"""Open: a Scan over stacks of the experts' weights, so that the number of experts may change.

Each expert runs on its own rows only; one without rows runs products of zero rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from .builder import Builder
from .site import Site

END = 2**62  # end of a slice that has none


def scan(build: Builder, site: Site) -> ir.Value:
    op, const = build.op, build.constant
    gates_ET = op("Transpose", site.gates, perm=[1, 0])
    total = op("Expand", op("CastLike", const(0), site.x), op("Shape", site.x))
    *base, stacked = site.weights
    if base:  # the frozen region, which has the first gate and is not in the stacks
        total = _added(build, site, total, op("Gather", gates_ET, const(0), axis=0), base[0])
        gates_ET = op("Slice", gates_ET, const([1]), const([END]), const([0]))
    stacks = [w for w, open_ in zip(stacked, site.call.open, strict=True) if open_]
    body = _body(Builder(f"{build.name}.each"), site, stacked)
    return op("Scan", total, gates_ET, *stacks, body=body, num_scan_inputs=1 + len(stacks))


def _body(build: Builder, site: Site, stacked: Sequence[ir.Value]) -> ir.Graph:
    """(sum so far, an expert's gates, its weights) -> the sum with its output."""

    def given(name: str, like: ir.Value, shape: Sequence[int | str]) -> ir.Value:
        return ir.Value(name=f"{build.name}.{name}", type=like.type, shape=ir.Shape(shape))

    total = given("sum", site.x, ["rows", site.width])
    gate = given("gate", site.gates, ["rows"])
    own = [
        given(f"weight_{i}", w, list(w.shape or ())[1:]) if open_ else w  # type: ignore[arg-type]
        for i, (w, open_) in enumerate(zip(stacked, site.call.open, strict=True))
    ]
    out = _added(build, site, total, gate, own)
    out.type, out.shape = total.type, total.shape
    mine = [w for w, open_ in zip(own, site.call.open, strict=True) if open_]
    return ir.Graph([total, gate, *mine], [out], nodes=build.nodes, name=build.name)


def _added(
    build: Builder, site: Site, total: ir.Value, gate_T: ir.Value, weights: Sequence[ir.Value]
) -> ir.Value:
    """(T, D): the sum, plus one expert's output on the rows whose gate is not zero."""
    op, const = build.op, build.constant
    rows = op("Transpose", op("NonZero", gate_T), perm=[1, 0])
    x = op("Gather", site.x, op("Squeeze", rows, const([1])), axis=0)
    y = op("Mul", build.inline(site.body, [x, *weights]), op("Gather", gate_T, rows, axis=0))
    return op("ScatterND", total, rows, y, reduction="add")
