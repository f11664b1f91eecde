"""Sparse: rows are sorted by expert and split; each expert runs on its rows; outputs are put back.

All in standard operators; an expert without rows runs products of zero rows.
"""

from __future__ import annotations

import onnx_ir as ir

from .builder import Builder
from .site import Site


def sparse(build: Builder, site: Site) -> ir.Value:
    return _unbounded(build, site) if site.top_k is None else _bounded(build, site, site.top_k)


def _bounded(build: Builder, site: Site, k: int) -> ir.Value:
    """K experts a row: their outputs are gathered and added up in a fixed order."""
    op, const = build.op, build.constant
    gates_TK, experts_TK = op("TopK", site.gates, const([k]), outputs=2)
    flat = op("Reshape", experts_TK, const([-1]))
    count = op("Shape", flat)
    _, order = op("TopK", flat, count, outputs=2, largest=0)
    _, inverse = op("TopK", order, count, outputs=2, largest=0)
    each = const(list(range(len(site.weights))))
    hits = op("Equal", op("Unsqueeze", flat, const([1])), op("Unsqueeze", each, const([0])))
    counts = op("ReduceSum", op("Cast", hits, to=ir.DataType.INT64), const([0]), keepdims=0)
    x = op("Gather", site.x, op("Div", order, const(k)), axis=0)
    y = op("Concat", *_by_expert(build, site, x, counts), axis=0)
    y_TKD = op("Reshape", op("Gather", y, inverse, axis=0), const([-1, k, site.width]))
    y_TKD = op("Mul", y_TKD, op("Unsqueeze", gates_TK, const([2])))
    return op("ReduceSum", y_TKD, const([1]), keepdims=0)


def _unbounded(build: Builder, site: Site) -> ir.Value:
    """Any number of experts a row: one after the other, each adds its output to its rows."""
    op, const = build.op, build.constant
    gates_ET = op("Transpose", site.gates, perm=[1, 0])
    ranges = op("Transpose", op("NonZero", gates_ET), perm=[1, 0])  # (n, 2): expert and row, sorted
    counts = op("Cast", op("Cast", gates_ET, to=ir.DataType.BOOL), to=ir.DataType.INT64)
    counts = op("ReduceSum", counts, const([1]), keepdims=0)
    gates = op("Unsqueeze", op("GatherND", gates_ET, ranges), const([1]))
    rows = op("Gather", ranges, const([1]), axis=1)
    x = op("Gather", site.x, op("Squeeze", rows, const([1])), axis=0)
    parts = _by_expert(build, site, x, counts)
    total = op("Expand", op("CastLike", const(0), site.x), op("Shape", site.x))
    if len(parts) == 1:
        return op("ScatterND", total, rows, op("Mul", parts[0], gates), reduction="add")
    rows_of = op("Split", rows, counts, outputs=len(parts))
    gates_of = op("Split", gates, counts, outputs=len(parts))
    for y, mine, gate in zip(parts, rows_of, gates_of, strict=True):
        total = op("ScatterND", total, mine, op("Mul", y, gate), reduction="add")
    return total


def _by_expert(build: Builder, site: Site, x: ir.Value, counts: ir.Value) -> list[ir.Value]:
    """Each expert's output for its rows, which are consecutive in the sorted x."""
    parts = (
        [x] if len(site.weights) == 1 else build.op("Split", x, counts, outputs=len(site.weights))
    )
    return [build.inline(site.body, [p, *w]) for p, w in zip(parts, site.weights, strict=True)]
