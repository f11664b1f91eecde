"""nn.Module -> Program, by torch.export.

Capture needs only the sizes and dtypes of its example: values are replaced by zeros, and sizes
are changed where torch.export would take a size for a constant (1) or two sizes for one
(batch == length).
"""

from __future__ import annotations

import inspect
import threading
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..errors import CaptureError, InputError
from ..ir.conditions import relations_of
from ..ir.program import Input, Program
from ..utils.quantized import is_quantized, scheme
from ..utils.zero_stage_3 import own_linear
from .advice import advice
from .arguments import is_cache, is_channels_last, is_fixed, is_paged, split_static
from .blocks.replay import redirected
from .caches.cache_leaves import CacheLeaves
from .choose_host import host_of
from .host import Host
from .tracing.assignments import recorded_assignments, require_no_state
from .tracing.cumulative_norm import count_in_tensors
from .tracing.detached_data import detached_data
from .tracing.fake_results import remembered_results
from .tracing.idle_moves import idle_moves
from .tracing.size_quotients import known_quotients
from .tracing.symbolic_ints import taken_for_ints
from .tracing.trace_memory import forget_inputs, lazy_modules, tracing
from .tracing.value_branches import ValueBranches
from .tracing.whole_modules import Kind, name_calls, on_values, run_whole, traced_whole
from .weights.structural_copy import canonical_names, named_tensors, structural_copy

TRACING = threading.RLock()  # torch.export and its patches change state of the whole process
# How sizes of the example are chosen: "general" serves most calls; with "ones", sizes of 0 and 1
# are constants; with "own", the others are the call's, so that branches go the way of this call.
Sizes = Literal["general", "ones", "own"]
BATCH_SIZES = (3, 5, 7, 11, 13)  # tried in this order: the first that no other size equals
SHORT = 9  # stands in for a sequence of length one


def dynamic_dims(name: str, tensor: torch.Tensor, cached: bool = False) -> tuple[int, ...]:
    """The dimensions of an argument that may differ from call to call: batch, then lengths."""
    mask = "mask" in name
    if tensor.ndim == 0:
        return ()
    if tensor.ndim == 4:
        if cached:
            return (0, 2)  # (batch, heads, length, width)
        return (0, 2, 3) if mask else (0,)  # an attention mask, or an image
    if tensor.is_floating_point() and tensor.ndim == 2 and not mask:
        return (0,)
    return (0, 1)[: tensor.ndim] if tensor.ndim <= 3 else (0,)


def example_like(traced: dict[str, Any], sizes: Sizes = "general") -> dict[str, Any]:
    """Zeros shaped like the arguments, with sizes that torch.export does not confuse.

    A dynamic dimension of size 0 or 1 is enlarged unless it is wanted as a constant (export would
    make it one), and the batch gets a size that no other dimension has.
    """
    if sizes == "own":
        return traced
    constant = sizes == "ones"
    caches = [name for name, given in traced.items() if is_cache(given)]
    if any(is_paged(traced[name]) for name in caches):
        return traced["cache"].example(traced, constant)
    tensors = [t for t in pytree.tree_leaves(traced) if isinstance(t, torch.Tensor)]
    taken = {s for t in tensors for s in t.shape}
    batch = next(b for b in (*BATCH_SIZES, 1009) if b not in taken)
    old_batch = next((t.shape[0] for t in tensors if t.ndim), None)

    def enlarge(name: str, tensor: Any) -> Any:
        if not isinstance(tensor, torch.Tensor):
            return tensor  # an int
        shape = list(tensor.shape)
        for dim in dynamic_dims(name, tensor, name in caches):
            if constant and shape[dim] <= 1:
                continue
            if dim == 0 and shape[0] in (old_batch, 1):
                shape[0] = batch
            elif shape[dim] <= 1:
                shape[dim] = SHORT
        zeros = tensor.new_zeros(shape)
        return zeros.to(memory_format=torch.channels_last) if is_channels_last(tensor) else zeros

    example = {n: pytree.tree_map(lambda t, n=n: enlarge(n, t), v) for n, v in traced.items()}
    if caches and getattr(example.get("attention_mask"), "ndim", 0) == 2:
        main: Any = example.get("input_ids", example.get("inputs_embeds"))
        (name,) = caches
        past = pytree.tree_leaves(example[name])[0].shape[2]
        length = past + main.shape[1]
        if is_fixed(example[name]):  # its mask covers what is filled
            length = main.shape[1] + 2
            example[name] = pytree.tree_map(partial(_roomy, longest=length + 5), example[name])
        mask = example["attention_mask"]
        example["attention_mask"] = mask.new_zeros(mask.shape[0], length)
    return example


def _roomy(tensor: torch.Tensor, longest: int) -> torch.Tensor:
    """Zeros like a tensor of a fixed cache, of a size that no other dimension has."""
    if tensor.ndim != 4:
        return tensor
    return tensor.new_zeros(*tensor.shape[:2], longest, tensor.shape[3])


def _dynamic_shapes(
    name: str, given: Any, sizes: Sizes, lengths: bool, cached: bool = False
) -> Any:
    """The `dynamic_shapes` of torch.export for one argument. lengths: dimensions besides the batch
    are open too."""
    if isinstance(given, torch.Tensor):
        dims = dynamic_dims(name, given, cached)
        dims = dims if lengths else dims[:1]
        if sizes != "general":
            dims = tuple(d for d in dims if given.shape[d] > 1)
        return dict.fromkeys(dims, torch.export.Dim.AUTO)
    if isinstance(given, int):
        return torch.export.Dim.AUTO
    if isinstance(given, dict):
        return {k: _dynamic_shapes(name, v, sizes, lengths, cached) for k, v in given.items()}
    if type(given) in (list, tuple):
        return type(given)(_dynamic_shapes(name, v, sizes, lengths, cached) for v in given)
    children, _ = pytree.SUPPORTED_NODES[type(given)].flatten_fn(given)
    return [_dynamic_shapes(name, v, sizes, lengths, is_cache(given)) for v in children]


def _make_explicit(
    host: nn.Module, given: CacheLeaves, static: dict[str, Any], branches: ValueBranches
) -> None:
    """Give forward exactly the traced arguments as its signature, the rest as constants."""
    original: Callable = host.forward
    alike = {n: _equal_sizes(v) for n, v in given.passed.items() if n in given.names or is_cache(v)}

    def forward(**kwargs: Any) -> Any:
        for name, sizes in alike.items():
            leaves = pytree.tree_leaves(kwargs[name])
            if any(leaves[a].shape[dim] != leaves[b].shape[dim] for a, b, dim in sizes):
                raise InputError(f"{name}: its layers have other sizes than in the example")
        kwargs = given.whole(kwargs)
        branches.start(kwargs)
        return original(**kwargs, **static)

    parameter = inspect.Parameter
    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [parameter(n, parameter.POSITIONAL_OR_KEYWORD, default=None) for n in given.passed]
    )
    host.forward = forward


def _equal_sizes(cache: Any) -> list[tuple[int, int, int]]:
    """(leaf, leaf, dimension) of the sizes that layers of a cache have in common: with a symbol
    each, every layer would be a case of its own."""
    leaves = pytree.tree_leaves(cache)
    pairs = []
    for dim in dynamic_dims("", leaves[0], cached=True):
        first: dict[int, int] = {}
        for i, leaf in enumerate(leaves):
            if leaf.ndim == 4 and (other := first.setdefault(leaf.shape[dim], i)) != i:
                pairs.append((other, i, dim))
    return pairs


def program_of(model: nn.Module, example_inputs: Any = None, mode: str = "eval") -> Program:
    """A model's graph, captured with all modules in one mode.

    example_inputs: tensor, tuple or dict; None infers them. Raises InputError and CaptureError.
    """
    host = host_of(structural_copy(model).train(mode == "train"))
    return capture(host, host.arguments(example_inputs), mode)


def capture(
    host: Host, arguments: dict[str, Any], mode: str, sizes: Sizes = "general",
    open_ints: frozenset[str] = frozenset(), copy_blocks: bool = True,
) -> Program:  # fmt: skip
    """Capture `host` as it stands (its submodules' training flags included) on these arguments.

    arguments: by name; only sizes and dtypes of tensors matter. mode: that of the host's modules;
    both are captured with gradients enabled, so that no_grad regions are seen. open_ints: arguments
    whose ints are inputs of the graph. copy_blocks: trace blocks that are alike once, see `replay`.
    Raises CaptureError with the reason torch.export gave.
    """
    traced, static = split_static(arguments, open_ints)
    if not traced:
        raise InputError("no tensor among the arguments: pass the model's inputs as tensors")
    example = example_like(traced, sizes)
    attempts = [(example, True)] + ([(traced, True)] if sizes != "own" else [])
    first: Exception | None = None
    for tried, lengths in (*attempts, (example, False)):
        # numbers that follow from lengths alone are known where these are constants
        if lengths == bool(first and on_values(first)):
            continue
        try:
            return traced_whole(
                partial(_export, host, traced, tried, static, mode, sizes, lengths, copy_blocks),
                host.module,
            )
        except Exception as error:  # torch.export raises many kinds; all mean "not captured"
            first = first or error
    shapes = {
        n: [list(getattr(t, "shape", [])) for t in pytree.tree_leaves(v)] for n, v in traced.items()
    }
    assert first is not None
    reason, what_to_do = advice(first)
    raise CaptureError(
        f"{host.name} could not be captured on inputs of shapes {shapes}: "
        f"{reason}{_place(host.module, first)}. {what_to_do}."
    ) from first


def _place(host: nn.Module, error: Exception) -> str:
    """The line of the model's own code that raised it."""
    kinds = {type(m) for m in host.modules() if not type(m).__module__.startswith("torch.")}
    codes = [getattr(inspect.unwrap(kind.forward), "__code__", None) for kind in kinds]
    files = {code.co_filename for code in codes if code is not None}
    lines = [f for f in traceback.extract_tb(error.__traceback__) if f.filename in files]
    if not lines:
        return ""
    code = f": {lines[-1].line}" if lines[-1].line else ""
    return f" (at {lines[-1].filename}:{lines[-1].lineno}{code})"


def _export(
    host: Host, given: dict[str, Any], example: dict[str, Any], static: dict[str, Any], mode: str,
    sizes: Sizes, lengths: bool, copy_blocks: bool, whole: frozenset[Kind] = frozenset(),
) -> Program:  # fmt: skip
    """given: the call's own tensors, whose values decide where code branches on them."""
    leaves = CacheLeaves(example)
    shapes = {
        n: _dynamic_shapes(n, v, sizes, lengths, n in leaves.names)
        for n, v in leaves.passed.items()
    }
    traced = host.copy_to_trace()  # a trace may leave fake tensors in attributes
    count_in_tensors(traced.module)
    branches = ValueBranches.of(given, traced.module)
    _make_explicit(traced.module, leaves, static, branches)
    replay = redirected(traced.module) if copy_blocks and not whole else None
    try:
        with (
            TRACING, torch.enable_grad(), traced.traced(), tracing(), remembered_results(),
            lazy_modules(), recorded_assignments() as assigned, own_linear(),
            idle_moves(), known_quotients(), detached_data(), run_whole(traced.module, whole),
            branches.answering(), taken_for_ints(traced.module, example.values()),
        ):  # fmt: skip
            exported = torch.export.export(
                traced.module, args=(), kwargs=leaves.passed, strict=False, dynamic_shapes=shapes
            )
            name_calls(exported.graph)
            if replay is not None:
                replay.expand(exported.graph)
    except Exception as error:
        if replay is None or on_values(error) or not (replay.copied or replay.own_error):
            raise
        return _export(host, given, example, static, mode, sizes, lengths, copy_blocks=False)
    forget_inputs(exported)
    require_no_state(exported, assigned)
    copied = replay.copied if replay is not None else 0
    weights = named_tensors(host.module)
    schemes = {name: scheme(tensor) for name, tensor in weights if is_quantized(tensor)}
    return _to_program(traced, exported, mode, leaves, copied, branches, schemes)


def _to_program(
    host: Host, exported: Any, mode: str, leaves: CacheLeaves, copied: int,
    branches: ValueBranches, schemes: dict[str, str],
) -> Program:  # fmt: skip
    kinds = {"PARAMETER": "weight", "BUFFER": "buffer", "USER_INPUT": "user"}
    names = canonical_names(host.module)
    example, graph = leaves.example, exported.graph
    caches = tuple(f"{name}_" for name, given in example.items() if is_cache(given))
    inputs = {name: Input("cache", name) for name in leaves.expand(graph)}
    owner: dict[str, Any] = {}
    by_name = {n.name: n for n in graph.find_nodes(op="placeholder")}
    for spec in exported.graph_signature.input_specs:
        node = by_name[spec.arg.name]
        kind = kinds.get(spec.kind.name, "constant")
        if kind == "user" and spec.arg.name.startswith(caches) and spec.arg.name not in example:
            kind = "cache"
        name = names.get(spec.target, spec.target) if spec.target else spec.arg.name
        if kind == "user" and isinstance(node.meta.get("val"), (torch.SymInt, int)):
            kind = "int"
        called = kind in ("user", "cache", "int")
        if called and kind != "int" and not isinstance(node.meta.get("val"), torch.Tensor):
            raise CaptureError(f"argument {name} is not a tensor in the captured graph")
        if kind in ("weight", "buffer") and name in owner:  # a tied name: one placeholder is enough
            node.replace_all_uses_with(owner[name])
        if not called and (not node.users or owner.get(name, node) is not node):
            graph.erase_node(node)
            continue
        owner[name] = node
        inputs[node.name] = Input(kind, name, schemes.get(name, ""))
    mutations = [s for s in exported.graph_signature.output_specs if s.kind.name != "USER_OUTPUT"]
    if mutations:
        raise CaptureError(f"the graph writes outputs other than its own: {mutations}")
    constants = {
        i.name: exported.constants[i.name] for i in inputs.values() if i.kind == "constant"
    }
    return Program(
        graph=graph,
        root=exported.graph_module,
        inputs=inputs,
        constants=constants,
        in_spec=pytree.tree_structure(((), example)),
        out_spec=exported.call_spec.out_spec,
        mode=mode,
        relations=relations_of(exported, tuple(branches.relations)),
        values=tuple(branches.values.values()),
        model=host.name,
        copied=copied,
        # where the graph has an explicit mask, eager attention may choose another kernel
        numerics=(("capture", "reordered"),),
    )
