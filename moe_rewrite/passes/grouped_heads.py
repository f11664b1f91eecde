"""Attention whose queries share heads of keys and values, without copies of these on the CPU.

transformers repeats the heads of keys and values where a mask is given, the whole cache at each
token; PyTorch's kernel for the CPU reads a head as often as it is needed. Exact: the same products.
"""

from __future__ import annotations

import torch
from torch import fx

from ..ir.aten import expression, value
from ..ir.ops import alias_root, argument, mutated, op_name
from ..ir.program import Program

OPTIONS = ("attn_mask", "dropout_p", "is_causal", "scale")


def attend(
    query_BHSD: torch.Tensor, key_BGTD: torch.Tensor, value_BGTD: torch.Tensor, repeats: int,
    mask: torch.Tensor | None, dropout: float, causal: bool, scale: float | None,
) -> torch.Tensor:  # fmt: skip
    """(B, H, S, D) scaled dot product attention, H = G * repeats. mask: as PyTorch's."""
    key, values = key_BGTD, value_BGTD
    shares = (
        query_BHSD.is_cpu
        and not torch.is_grad_enabled()
        and not torch.compiler.is_exporting()
        and not torch.jit.is_tracing()
    )
    if not shares:
        key, values = (
            t.unsqueeze(2).expand(-1, -1, repeats, -1, -1).flatten(1, 2) for t in (key, values)
        )
    return torch.nn.functional.scaled_dot_product_attention(
        query_BHSD, key, values, mask, dropout, causal, scale=scale, enable_gqa=shares
    )


def share_heads(program: Program) -> None:
    """Let attention take heads of keys and values as they are before they are repeated, in place."""
    nodes = list(program.graph.nodes)
    places = {node: i for i, node in enumerate(nodes)}
    writes = {i: {alias_root(w) for w in mutated(node)} for node, i in places.items()}
    for node in nodes:
        if op_name(node) != "scaled_dot_product_attention" or argument(node, "enable_gqa"):
            continue
        repeated = [argument(node, name) for name in ("key", "value")]
        shared = [_before_repeating(r) for r in repeated]
        if any(s is None for s in shared) or shared[0][1] != shared[1][1]:  # type: ignore[index]
            continue
        (keys, repeats), (values, _) = shared  # type: ignore[misc]
        read = {alias_root(keys), alias_root(values)}
        between = range(min(places[r] for r in repeated), places[node])
        if any(writes[i] & read for i in between):
            continue
        given = (argument(node, "query"), keys, values, repeats)
        options = tuple(argument(node, name) for name in OPTIONS)
        node.target, node.args, node.kwargs = attend, (*given, *options), {}
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
