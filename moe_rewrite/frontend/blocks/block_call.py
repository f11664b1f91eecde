"""One call of a block in a trace: its tensors, by what they are to the block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental import proxy_tensor
from torch.utils import _pytree as pytree

from ...ir.aten import expression
from ...ir.ops import mutated
from ...utils.content_key import content_key
from ..tracing.fake_results import tracing_context
from .repeated_blocks import Index, plain_number

Role = tuple  # ("own", name), ("given", number of the leaf) or ("kept", leaf, number, attribute)


class BlockCall:
    """block: the module called. numbers: the whole numbers among its attributes, by name.

    roles: its tensors.
    """

    def __init__(
        self, block: nn.Module, tracer: Any, args: tuple, kwargs: dict,
        numbers: dict[str, int], varying: set[str],
    ) -> None:  # fmt: skip
        self.block, self.tracer, self.args, self.kwargs = block, tracer, args, kwargs
        self.numbers = numbers
        self.leaves, self._spec = pytree.tree_flatten((args, kwargs), is_leaf=_keeps_layers)
        self.roles: dict[Role, torch.Tensor] = {}
        for named in (block.named_parameters, block.named_buffers):
            self.roles.update({("own", n): t for n, t in named()})
        for i, leaf in enumerate(self.leaves):
            if isinstance(leaf, torch.Tensor):
                self.roles["given", i] = leaf
        self.layers: dict[tuple[int, str], Any] = {}  # of caches: those with the block's numbers
        for i, leaf in enumerate(self.leaves):
            for name in sorted(varying) if _keeps_layers(leaf) else ():
                if 0 <= numbers[name] < len(leaf.layers):
                    self.layers[i, name] = leaf.layers[numbers[name]]
        for (i, name), layer in self.layers.items():
            for attribute, given in vars(layer).items():
                if isinstance(given, torch.Tensor):
                    self.roles["kept", i, name, attribute] = given
        self.kept = {place: dict(vars(layer)) for place, layer in self.layers.items()}
        self._slots = {
            role: proxy_tensor.get_proxy_slot(t, tracer, None) for role, t in self.roles.items()
        }

    def form(self) -> tuple:
        """What another call must have in common with this one, as far as the trace knows now."""
        tensors: dict[int, Role] = {}
        given = tuple(  # those of the block itself have the form that blocks have in common
            (tensors.setdefault(id(t), role), role[0] == "own" or form_of_value(t))
            for role, t in self.roles.items()
        )
        other = tuple(map(_constant, self.leaves))
        kept = tuple(
            (place, type(self.layers[place]), tuple((n, _constant(v)) for n, v in values.items()))
            for place, values in self.kept.items()
        )
        return str(self._spec), given, other, kept, tracing_context()

    def nodes(self) -> dict[Role, fx.Node]:
        """The node of each tensor; those that are known to be constants are left out."""
        slots = self._slots.items()
        return {r: s.proxy.node for r, s in slots if s is not None and s.constant is None}

    def restore_nodes(self) -> None:
        """Give the tensors their nodes of before the call: an operation that returns the tensor
        itself (a cast to its own dtype) makes it known by a node inside the block."""
        for role, slot in self._slots.items():
            now = proxy_tensor.get_proxy_slot(self.roles[role], self.tracer, None)
            if slot is None or now is None or now is slot:
                continue
            if not mutated(now.proxy.node):
                proxy_tensor.set_proxy_slot(self.roles[role], self.tracer, slot)

    def changed(self) -> dict[Role, Any] | None:
        """What the call has put into its layers of a cache; None if it changed more."""
        before = [id(leaf) for leaf in self.leaves]
        now, _ = pytree.tree_flatten((self.args, self.kwargs), is_leaf=_keeps_layers)
        if before != [id(leaf) for leaf in now]:
            return None
        return {
            ("kept", *place, name): value
            for place, layer in self.layers.items()
            for name, value in vars(layer).items()
            if name not in self.kept[place] or self.kept[place][name] is not value
        }

    @contextmanager
    def watched_caches(self) -> Iterator[None]:
        """In this context, caches take the block's numbers to choose a layer, which is not looking
        at them; see `repeated_blocks.Index`."""
        caches = [leaf for leaf in self.leaves if _keeps_layers(leaf)]
        kinds = [type(c) for c in caches]
        try:
            for each in caches:
                each.__class__ = _taking_numbers(each.__class__)
            yield
        finally:
            for each, kind in zip(caches, kinds, strict=True):
                each.__class__ = kind


def form_of_value(made: Any) -> Any:
    """Sizes, strides and dtype of a traced value, in the symbols of the trace."""
    if isinstance(made, torch.Tensor):
        sizes = tuple(map(expression, (*made.shape, *made.stride(), made.storage_offset())))
        return type(made), sizes, made.dtype, made.device, made.requires_grad
    if isinstance(made, (list, tuple)):
        return tuple(map(form_of_value, made))
    return expression(made)


def _keeps_layers(given: Any) -> bool:
    """Whether it is a cache: an object with a list of layers that have attributes."""
    layers = getattr(given, "layers", None)
    return isinstance(layers, list) and not isinstance(given, nn.Module)


def _constant(given: Any) -> Any:
    """A key of a value that is not a tensor; sizes by their expression."""
    size = expression(given)
    if size is not given:
        return str(size)
    return None if isinstance(given, torch.Tensor) else content_key(given, id)


@cache
def _taking_numbers(kind: Any) -> Any:
    """A subclass of a cache whose methods are given plain numbers."""

    def plain(method: Callable) -> Callable:
        @wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            args, kwargs = pytree.tree_map_only(Index, plain_number, (args, kwargs))
            return method(self, *args, **kwargs)

        return call

    methods = {
        name: plain(method)
        for base in reversed(kind.__mro__[:-1])
        for name, method in vars(base).items()
        if callable(method) and not name.startswith("__") and not isinstance(method, type)
    }
    return type(kind.__name__, (kind,), methods)
