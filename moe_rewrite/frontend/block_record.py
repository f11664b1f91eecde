"""The nodes that one call of a block added to a trace, and copies of them for another call."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental import proxy_tensor
from torch.utils import _pytree as pytree

from ..ir.aten import expression
from ..ir.ops import alias_root, mutated
from ..utils.content_key import content_key
from .block_call import BlockCall, Role, form_of_value

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)


class Record:
    """nodes: those that the call added, in order, without computations of sizes, which later blocks
    share. roles: what nodes from outside are to the block. leaves: of the output. written: into the
    block's layers of a cache. numbers: of the block. form: None if the nodes cannot be copied."""

    def __init__(self, call: BlockCall, nodes: list[fx.Node], output: Any) -> None:
        self.nodes = [n for n in nodes if not is_size(n)]
        self._place = {n: i for i, n in enumerate(self.nodes)}
        self._tracer, self.numbers = call.tracer, call.numbers
        self.roles: dict[fx.Node, list[Role]] = {}
        for role, node in call.nodes().items():
            self.roles.setdefault(node, []).append(role)
        leaves, self._spec = pytree.tree_flatten(output)
        self.tensors: dict[fx.Node, torch.Tensor] = {}
        self.leaves = [self._node_of(leaf) for leaf in leaves]
        changed = call.changed()
        self.written = {role: self._node_of(v) for role, v in (changed or {}).items()}
        self._stack = _stack_of(call.tracer)
        self.copies = 0
        self.form = self._form() if changed is not None and self._can_be_copied(nodes) else None

    @classmethod
    def of(cls, call: BlockCall, before: fx.Node, output: Any) -> Record | None:
        """before: the last node before the call."""
        nodes, node = [], before.next
        while node.op != "root":
            nodes.append(node)
            node = node.next
        record = cls(call, nodes, output)
        return record if record.form is not None else None

    def _node_of(self, value: Any) -> Any:
        """The node of a tensor, which is kept to make others like it; other values as they are."""
        if not isinstance(value, torch.Tensor):
            return value
        slot = proxy_tensor.get_proxy_slot(value, self._tracer, None)
        if slot is None or slot.constant is not None or value.requires_grad:
            return value  # `_can_be_copied` refuses it
        self.tensors[slot.proxy.node] = value
        return slot.proxy.node

    def _can_be_copied(self, nodes: list[fx.Node]) -> bool:
        made = [*self.leaves, *self.written.values()]
        known = self._place.keys() | self.roles.keys()
        sources = {s for n in self.nodes for s in n.all_input_nodes}
        outside = [n for n in (*sources, *made) if isinstance(n, fx.Node) and n not in known]
        return (
            all(is_size(n) or n.op == "get_attr" for n in outside)
            and not any("unbacked_bindings" in n.meta for n in nodes)
            and all(_is_plain(n, self._tracer) for n in (*nodes, *outside))
            and not any(isinstance(m, torch.Tensor) for m in made)
            and not any(self._is_given(n) for node in self.nodes for n in mutated(node))
        )

    def _is_given(self, node: fx.Node) -> bool:
        """Whether it is a tensor of the call, or a view of one."""
        return any(role[0] != "own" for role in self.roles.get(alias_root(node), ()))

    def _form(self) -> tuple:
        nodes = tuple(
            (n.op, n.target, self._key(n.args), self._key(dict(n.kwargs)),
             form_of_value(n.meta.get("val")))
            for n in self.nodes
        )  # fmt: skip
        written = tuple((role, self._key(made)) for role, made in self.written.items())
        return nodes, self._key(self.leaves), str(self._spec), written

    def _key(self, given: Any) -> Any:
        return content_key(fx.map_arg(given, self._reference), id)

    def _reference(self, node: fx.Node) -> Any:
        if node in self._place:
            return "node", self._place[node]
        if node in self.roles:
            return "role", str(self.roles[node])
        return "size", str(expression(node.meta["val"])) if is_size(node) else str(node.target)

    def sources_in(self, call: BlockCall) -> dict[fx.Node, fx.Node] | None:
        """What stands for the nodes from outside in another call of the same form; None if its
        tensors are related in another way."""
        theirs = call.nodes()
        made = [*self.leaves, *self.written.values()]
        needed = {s for n in self.nodes for s in n.all_input_nodes}.union(
            n for n in made if isinstance(n, fx.Node)
        )
        found: dict[fx.Node, fx.Node] = {}
        for node, roles in self.roles.items():
            others = {theirs.get(role) for role in roles}
            if len(others) == 1 and (other := others.pop()) is not None:
                found[node] = other
            elif node in needed:
                return None
        return found

    def copy(self, call: BlockCall, at: dict[fx.Node, fx.Node]) -> Any:
        """Copy the nodes for another call, and return its output. at: from `sources_in`."""
        stack = _stack_of(call.tracer)
        for node in self.nodes:
            copy = call.tracer.graph.node_copy(node, lambda n: at.get(n, n))
            copy.meta = dict(node.meta)
            copy.meta["nn_module_stack"] = _moved(node, self._stack, stack)
            at[node] = copy
        tensors = {n: self._tensor_of(n, at[n], call) for n in self.tensors}
        for (_, leaf, name, attribute), made in self.written.items():
            value = tensors[made] if isinstance(made, fx.Node) else made
            setattr(call.layers[leaf, name], attribute, value)
        leaves = [tensors[made] if isinstance(made, fx.Node) else made for made in self.leaves]
        self.copies += 1
        return pytree.tree_unflatten(leaves, self._spec)

    def _tensor_of(self, node: fx.Node, copy: fx.Node, call: BlockCall) -> torch.Tensor:
        if node in self.roles:  # the block returns what it was given
            return call.roles[self.roles[node][0]]
        fresh: Any = proxy_tensor.snapshot_fake(self.tensors[node])
        proxy = fx.Proxy(copy, call.tracer)
        return proxy_tensor.track_tensor_tree(fresh, proxy, constant=None, tracer=call.tracer)

    def escapes(self, outputs: Any) -> bool:
        """Whether a value from inside the block is used outside, other than its outputs.

        outputs: the model's.
        """
        free = self._place.keys() - self.tensors.keys()
        returned = (t for t in pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor))
        slots = (proxy_tensor.get_proxy_slot(t, self._tracer, None) for t in returned)
        if any(s is not None and s.proxy.node in free for s in slots):
            return True
        return any(u not in self._place and not is_size(u) for n in free for u in n.users)


def is_size(node: fx.Node) -> bool:
    """Whether it computes a size; blocks share these, as a trace does."""
    return node.op == "call_function" and isinstance(node.meta.get("val"), SYMBOLIC)


def _is_plain(node: fx.Node, tracer: Any) -> bool:
    """Whether a node is not a sub-graph, which a trace would make anew for each block."""
    if node.op != "get_attr":
        return node.op in ("call_function", "placeholder")
    return isinstance(getattr(tracer.root, str(node.target), None), torch.Tensor)


Stack = list[tuple[str, tuple[str, Any]]]


def _stack_of(tracer: Any) -> Stack:
    """The modules that are being called: (key, (path, class)), outermost first."""
    return list(tracer.module_stack.items())


def _moved(node: fx.Node, ours: Stack, theirs: Stack) -> dict[str, tuple[str, str]]:
    """A node's stack of modules, in another block: its path in place of this block's."""
    block, other = ours[-1][1][0], theirs[-1][1][0]
    moved = {key: (path, _written(kind)) for key, (path, kind) in theirs}
    inside = list(node.meta.get("nn_module_stack", {}).items())[len(ours) :]
    for key, (path, kind) in inside:
        if path.startswith(block):
            key, path = other + key.removeprefix(block), other + path.removeprefix(block)
        moved[key] = path, kind
    return moved


def _written(kind: Any) -> str:
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
