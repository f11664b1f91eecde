"""Maps over a line, (B, channels, positions), as 1-d convolutions have them."""

from __future__ import annotations

from torch import fx

from ..ir.aten import value
from ..ir.ops import is_pointwise, op, op_name

ON_CHANNELS = {
    "batch_norm", "group_norm", "instance_norm", "conv1d", "convolution", "conv_transpose1d",
    "max_pool1d", "avg_pool1d", "adaptive_avg_pool1d", "prelu",
}  # fmt: skip


def is_line_map(node: fx.Node) -> bool:
    """Whether the second dimension of a value of three has the features, by the last operation
    that tells: sizes would not."""
    return bool(_features_second(node, set()))


def _features_second(node: fx.Node, seen: set[fx.Node]) -> bool | None:
    """None if nothing tells."""
    if node.op != "call_function" or value(node).ndim != 3 or node in seen:
        return None
    seen.add(node)
    if op_name(node) in ON_CHANNELS:
        return True
    if op(node).positions == "features" or op_name(node) in ("embedding", "matmul"):
        return False
    if not (op(node).transposes or op(node).cast or is_pointwise(node)):
        return None
    sources = [s for s in node.all_input_nodes if getattr(value(s), "ndim", 0) == 3]
    known = next((k for s in sources if (k := _features_second(s, seen)) is not None), None)
    return not known if op(node).transposes and known is not None else known
