"""Modules that cannot be traced, since their code branches on values of tensors (experts that loop
over the tokens they were given): in the graph each is one call, which runs the module's own code.

What the call gives is read off a run of the module on random values; each call is held against it.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from types import FrameType
from typing import Any

import torch
from torch import fx, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.func import functional_call
from torch.utils import _pytree as pytree

from ...errors import CaptureError, InputError
from ..weights.structural_copy import working_copy

Kind = tuple[str, str]  # module and qualified name of a class: a trace may run subclasses of it
SYMBOLIC = (torch.SymInt, torch.SymBool, torch.SymFloat)
TENSOR = object()  # stands for a tensor among the arguments of a call
_calls: list[WholeCall] = []  # of the trace that is under way; there is one at a time
_library = torch.library.Library("moe_rewrite", "FRAGMENT")
_library.define("whole(Tensor[] tensors, int call) -> Tensor[]")


@dataclass(eq=False)
class WholeCall:
    """The target of a node: call(*arguments, *weights) runs a module's own code on them.

    module: a copy of its structure; names: of its weights. leaves, spec: its arguments, with TENSOR
    for each tensor. sizes: of each output, the number and dimension of the argument that has the
    same, or the size itself; set by the first run, as `outputs` is.
    """

    module: nn.Module
    names: list[str]
    leaves: list[Any]
    spec: Any
    sizes: tuple[tuple[Any, ...], ...] = ()
    outputs: Any = None
    lock: Any = field(default_factory=threading.RLock)  # a run sets the module's weights
    __name__ = "whole_call"

    def __deepcopy__(self, memo: dict) -> WholeCall:
        return self

    def writes(self, node: fx.Node) -> list[fx.Node]:
        return []

    def run(self, tensors: tuple[torch.Tensor, ...]) -> Any:
        given = iter(tensors)
        leaves = [next(given) if leaf is TENSOR else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        weights = dict(zip(self.names, given, strict=True))
        with self.lock:
            return functional_call(self.module, weights, args, kwargs, strict=False)

    def __call__(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        made = pytree.tree_leaves(self.run(tensors))
        for output, sizes in zip(made, self.sizes, strict=True):
            expected = _sized(sizes, tensors)
            if tuple(output.shape) != expected:
                raise InputError(
                    f"{type(self.module).__name__} branches on values of tensors, and here gives "
                    f"{tuple(output.shape)} where the example says {expected}: it cannot be part "
                    "of a converted model"
                )
        return [t.contiguous() for t in made]

    def try_out(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Set `sizes` and `outputs` by a run on random values of the example's sizes."""
        with unset_fake_temporarily(), torch.no_grad():
            values = [_random(t) for t in tensors]
            before = [t.clone() for t in values]
            made = self.run(tuple(values))
            flat, self.outputs = pytree.tree_flatten(made)
            unwritten = all(map(torch.equal, before, values))
        name = type(self.module).__name__
        if not all(isinstance(t, torch.Tensor) for t in flat):
            raise CaptureError(f"{name} branches on values and gives more than tensors")
        if not unwritten:
            raise CaptureError(f"{name} branches on values and writes to its arguments or buffers")
        shapes = [tuple(t.shape) for t in values]
        self.sizes = tuple(tuple(_origin(t, d, shapes) for d in range(t.ndim)) for t in flat)
        return flat


def _origin(output: torch.Tensor, dim: int, shapes: list[tuple[int, ...]]) -> Any:
    """(tensor, dimension) of the size that an output's dimension has in common with an argument,
    that at the same dimension first; its size if there is none."""
    size = output.shape[dim]
    places = [(i, d) for i, shape in enumerate(shapes) for d, s in enumerate(shape) if s == size]
    same = [place for place in places if place[1] == dim]
    return next(iter(same or places), size)


def _sized(sizes: tuple[Any, ...], tensors: Any) -> tuple[Any, ...]:
    return tuple(tensors[s[0]].shape[s[1]] if isinstance(s, tuple) else s for s in sizes)


def _random(t: torch.Tensor) -> torch.Tensor:
    shape = [s.node.hint if isinstance(s, torch.SymInt) else s for s in t.shape]
    if t.is_floating_point():
        return torch.rand(shape).to(t.dtype)
    return (
        torch.ones(shape, dtype=t.dtype)
        if t.dtype == torch.bool
        else torch.zeros(shape, dtype=t.dtype)
    )


def _fake(tensors: list[torch.Tensor], call: int) -> list[torch.Tensor]:
    flat = _calls[call].try_out(tensors)
    sizes = _calls[call].sizes
    return [
        tensors[0].new_empty(_sized(s, tensors), dtype=t.dtype)
        for s, t in zip(sizes, flat, strict=True)
    ]


def _real(tensors: list[torch.Tensor], call: int) -> list[torch.Tensor]:
    return _calls[call](*tensors)


_library._register_fake("whole", _fake)
_library.impl("whole", _real, "CompositeExplicitAutograd")


def branching_kind(model: nn.Module, error: Exception) -> Kind | None:
    """The class of the innermost module of the model's own in whose forward a trace has failed.
    Only modules within numbered ones: a whole stack of blocks would leave nothing to convert."""
    kinds = {
        _kind(type(module)) for name, module in model.named_modules()
        if any(part.isdigit() for part in name.split(".")) and not _is_plain(module)
    }  # fmt: skip
    trace = error.__traceback__
    found = None
    while trace is not None:
        module = _module_of(trace.tb_frame)
        if module is not None and not _is_plain(module):
            found = _kind(type(module))
        trace = trace.tb_next
    return found if found in kinds else None


def _module_of(frame: FrameType) -> nn.Module | None:
    """The module whose forward a frame runs."""
    module = frame.f_locals.get("self")
    if not isinstance(module, nn.Module):
        return None
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return module if frame.f_code is code else None


def _is_plain(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.")


def _kind(kind: type) -> Kind:
    return kind.__module__, kind.__qualname__


@contextmanager
def run_whole(model: nn.Module, kinds: frozenset[Kind]) -> Iterator[None]:
    """In this context, a trace of the model has one node for each call of a module of these
    classes. model: a working copy, which is changed."""
    try:
        for module in [m for m in model.modules() if _kind(type(m)) in kinds]:
            _redirect(module)
        yield
    finally:
        _calls.clear()


def _redirect(module: nn.Module) -> None:
    kind, inner = type(module), working_copy(module)

    @wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if detect_fake_mode() is None:
            return kind.forward(self, *args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if any(isinstance(leaf, SYMBOLIC) for leaf in leaves):
            raise CaptureError(f"{kind.__name__} branches on values and takes sizes")
        given = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        own = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        constants = [TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        call = WholeCall(inner, list(own), constants, spec)
        _calls.append(call)
        made = torch.ops.moe_rewrite.whole([*given, *own.values()], len(_calls) - 1)
        return pytree.tree_unflatten(list(made), call.outputs)

    names = {"forward": forward, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    module.__class__ = type(kind.__name__, (kind,), names)


def name_calls(graph: fx.Graph) -> None:
    """Let the nodes of a trace call their modules."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.moe_rewrite.whole.default):
        tensors, call = node.args
        node.target, node.args = _calls[call], tuple(tensors)


def traced_whole(trace: Callable[[frozenset[Kind]], Any], model: nn.Module) -> Any:
    """What `trace` gives for the fewest classes that have to run whole."""
    kinds: frozenset[Kind] = frozenset()
    before: Exception | None = None  # why classes run whole
    while True:
        try:
            return trace(kinds)
        except Exception as error:
            more = branching_kind(model, error)
            if not on_values(error) or more is None or more in kinds:
                raise error from error.__cause__ or before
            kinds |= {more}
            before = error


def on_values(error: BaseException) -> bool:
    """Whether a trace failed since it would have had to know a tensor's values."""
    from torch._subclasses import fake_tensor as fake
    from torch.fx.experimental import symbolic_shapes as shapes

    kinds = (
        fake.DataDependentOutputException, fake.DynamicOutputShapeException,
        shapes.GuardOnDataDependentSymNode,
    )  # fmt: skip
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, kinds):
            return True
        at = at.__cause__ or at.__context__
    return False
