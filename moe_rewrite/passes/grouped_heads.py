"""Attention whose queries share heads of keys and values, without copies of these on the CPU.

transformers repeats the heads of keys and values where a mask is given, the whole cache at each
token; PyTorch's kernel for the CPU reads a head as often as it is needed. Exact: the same products.
"""

from __future__ import annotations

from torch import fx

from ..ir.aten import expression, value
from ..ir.ops import alias_root, argument, mutated, op_name
from ..ir.program import Program
from .attend import attention_of, call_attend


def share_heads(program: Program) -> None:
    """Let attention take heads of keys and values as they are before they are repeated, in place."""
    nodes = list(program.graph.nodes)
    places = {node: i for i, node in enumerate(nodes)}
    writes = {i: {alias_root(w) for w in mutated(node)} for node, i in places.items()}
    for node in nodes:
        if (attention := attention_of(node)) is None:
            continue
        query, *repeated, _, mask, dropout, causal, scale = attention
        shared = [_before_repeating(r) for r in repeated]
        if any(s is None for s in shared) or shared[0][1] != shared[1][1]:  # type: ignore[index]
            continue
        (keys, repeats), (values, _) = shared  # type: ignore[misc]
        read = {alias_root(keys), alias_root(values)}
        between = range(min(places[r] for r in repeated), places[node])
        if any(writes[i] & read for i in between):
            continue
        call_attend(node, query, keys, values, repeats, mask, dropout, causal, scale)
        for copied, kept in zip(repeated, (keys, values), strict=True):
            while copied is not kept and not copied.users:
                unused, copied = copied, argument(copied, "self")
                program.graph.erase_node(unused)


def _before_repeating(node: fx.Node) -> tuple[fx.Node, int] | None:
    """What was repeated to (B, G * n, T, D), and n; None for anything else."""
    chain = [node]
    for name in (("reshape", "view"), ("expand",), ("unsqueeze",)):
        source = argument(chain[-1], "self") if op_name(chain[-1]) in name else None
        if not isinstance(source, fx.Node):
            return None
        chain.append(source)
    merged, expanded, _, heads = (tuple(map(expression, value(n).shape)) for n in chain)
    if len(heads) != 4 or len(expanded) != 5 or len(merged) != 4:
        return None
    batch, groups, length, width = heads
    repeats = expanded[2]
    if not isinstance(repeats, int) or not isinstance(groups, int):
        return None
    same = [(expanded, (batch, groups, repeats, length, width)),
            (merged, (batch, groups * repeats, length, width))]  # fmt: skip
    alike = all(a == b for a, b in same) and argument(chain[2], "dim") == 2
    return (chain[3], repeats) if alike else None
