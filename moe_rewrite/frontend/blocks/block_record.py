"""The nodes that one call of a block added to a trace, and copies of them for another call."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental import proxy_tensor
from torch.utils import _pytree as pytree

from ...errors import CaptureError
from ...ir.aten import expression
from ...ir.ops import alias_root, mutated
from ...utils.content_key import content_key
from .block_call import BlockCall, Role, form_of_value

MARK = "recorded"  # in a node's meta: the record's number, and the node's in it
_library = torch.library.Library("moe_rewrite", "FRAGMENT")
_library.define("given(Tensor(a!)[] given, int record) -> ()")  # as if it wrote, so that it stays
_library.define("copy(Tensor[] given, int record) -> Tensor[]")
GIVEN, COPY = torch.ops.moe_rewrite.given.default, torch.ops.moe_rewrite.copy.default
SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)


class Record:
    """nodes: those that the call added, in order, without computations of sizes, which later blocks
    share. roles: what nodes from outside are to the block. leaves: of the output. written: into the
    block's layers of a cache. numbers: of the block. form: None if the nodes cannot be copied.
    number: of the record in its trace, set before the first copy."""

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
        self.copies = self.stand_ins = self.number = 0
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
        made = [n for n in self.tensors if n not in self.roles]
        if self._in_trace:
            graph, stack = call.tracer.graph, _stack_of(call.tracer)
            copies = self._copied(graph, self.nodes, at, stack)
            proxies = [fx.Proxy(copies[n], call.tracer) for n in made]
        else:
            proxies = self._stand_in(call, at, made)
        tensors = {n: self._tensor_like(n, p, call) for n, p in zip(made, proxies, strict=True)}
        # the block may return what it was given
        tensors |= {n: call.roles[self.roles[n][0]] for n in self.tensors if n in self.roles}
        for (_, leaf, name, attribute), kept in self.written.items():
            value = tensors[kept] if isinstance(kept, fx.Node) else kept
            setattr(call.layers[leaf, name], attribute, value)
        leaves = [tensors[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in self.leaves]
        self.copies += 1
        return pytree.tree_unflatten(leaves, self._spec)

    def _tensor_like(self, node: fx.Node, proxy: Any, call: BlockCall) -> torch.Tensor:
        fresh: Any = proxy_tensor.snapshot_fake(self.tensors[node])
        return proxy_tensor.track_tensor_tree(fresh, proxy, constant=None, tracer=call.tracer)

    def _copied(
        self, graph: fx.Graph, nodes: list[fx.Node], at: dict[fx.Node, fx.Node], stack: Stack
    ) -> dict[fx.Node, fx.Node]:
        """Copies of these nodes, where new ones go in the graph now."""
        copies: dict[fx.Node, fx.Node] = {}
        for node in nodes:
            copies[node] = graph.node_copy(node, lambda n: copies.get(n) or at.get(n, n))
            copies[node].meta = dict(node.meta)
            copies[node].meta["nn_module_stack"] = _moved(node, self._stack, stack)
        return copies

    # -- copies that are made after the trace ------------------------------------------------------

    @property
    def _in_trace(self) -> bool:
        """Whether copies have to be in the trace: torch.export reads modes off its nodes, and drops
        a call whose output is not used."""
        return any(not _is_operator(n) or mutated(n) for n in self.nodes)

    def _stand_in(
        self, call: BlockCall, at: dict[fx.Node, fx.Node], made: list[fx.Node]
    ) -> list[fx.Proxy]:
        """Add one node in place of the copies; returns its outputs. The first also says what the
        sources and nodes are in the graph that torch.export makes of this one."""
        if not self.copies:
            self._sources = [n for n in self.roles if n in at]
            self._call(GIVEN, self._sources).node.meta["val"] = None
            for i, node in enumerate(self.nodes):
                node.meta[MARK] = self.number, i
            self._made = [self._place[n] for n in made]
        whole: Any = self._call(COPY, [at[n] for n in self._sources])
        whole.node.meta["val"] = [self.tensors[n] for n in made]
        self.stand_ins += 1
        return [whole[i] for i in range(len(made))]

    def _call(self, target: Any, given: list[fx.Node]) -> fx.Proxy:
        proxies = [fx.Proxy(n, self._tracer) for n in given]
        return self._tracer.create_proxy("call_function", target, (proxies, self.number), {})

    def expand(self, graph: fx.Graph) -> None:
        """In torch.export's graph, put copies of the nodes where others stand in for them. Raises
        CaptureError if the graph has become another."""
        nodes = [n for n in graph.nodes if n.meta.get(MARK, (None,))[0] == self.number]
        calls = [n for n in graph.nodes if n.target in (GIVEN, COPY) and _number(n) == self.number]
        if len(calls) != self.stand_ins + 1:
            raise CaptureError("copies of a block are in a part of the graph of its own")
        first, *wholes = calls
        sources = _given(first)
        known = {*nodes, *sources}
        inputs = {s for n in nodes for s in n.all_input_nodes} - known
        if not all(is_size(s) or s.op == "placeholder" for s in inputs):
            raise CaptureError("a block that is to be copied has other inputs than in the trace")
        places = {n.meta.pop(MARK)[1]: n for n in nodes}
        for whole in wholes:
            at = dict(zip(sources, _given(whole), strict=True))
            with graph.inserting_before(whole):
                copies = self._copied(graph, nodes, at, list(whole.meta["nn_module_stack"].items()))
            for output in list(whole.users):
                source = places.get(self._made[_number(output)])
                if source is None:
                    raise CaptureError("an output of a block is used in its copies only")
                output.replace_all_uses_with(copies[source])
                graph.erase_node(output)
            graph.erase_node(whole)
        graph.erase_node(first)

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


def _given(node: fx.Node) -> list[fx.Node]:
    """The tensors that one of the record's own nodes takes."""
    given: Any = node.args
    return list(given[0])


def _number(node: fx.Node) -> int:
    """Of the record, or of the output that is taken."""
    given: Any = node.args
    return given[1]


def _is_operator(node: fx.Node) -> bool:
    target: Any = node.target
    return isinstance(target, torch._ops.OpOverload) or target is operator.getitem


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
    block, other = _path(ours[-1]), theirs[-1][1][0]
    moved = {key: (path, _written(kind)) for key, (path, kind) in theirs}
    entries = list(node.meta.get("nn_module_stack", {}).items())
    own = next((i for i, entry in enumerate(entries) if _path(entry) == block), len(entries))
    for key, (path, kind) in entries[own + 1 :]:
        before, found, inside = path.partition(block + ".")
        moved[f"{other} {key}"] = f"{other}.{inside}" if found else before, kind
    return moved


def _path(entry: tuple[str, tuple[str, Any]]) -> str:
    """The module's path, in a trace (below its root) as in torch.export's own graph."""
    return entry[1][0].removeprefix("_export_root").removeprefix(".")


def _written(kind: Any) -> str:
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
