"""Tracing blocks that are alike once: the nodes of the first are copied for the others.

A block is traced in full the first time, and where numbers differ between blocks (a layer's index)
a second time; if both gave the same nodes, later blocks get copies, on their own tensors. A copy is
made only where the call is the same: arguments of the same structure, sizes, strides and constants.
Whatever cannot be followed (values that leave a block by another way than its outputs,
data-dependent sizes, sub-graphs) is traced in full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental import proxy_tensor

from ...errors import CaptureError
from .block_call import BlockCall
from .block_record import Record
from .repeated_blocks import noticing, numbers_of, repeated_blocks, varying_numbers

# what copying uses of PyTorch that is not its public interface; in a version without, blocks are traced
NEEDED = (
    "get_proxy_mode",
    "get_proxy_slot",
    "set_proxy_slot",
    "snapshot_fake",
    "track_tensor_tree",
)


class Replay:
    """Records of one trace, by form of the block, the numbers that it looked at, and form of the
    call. copied: how many calls of blocks were copied. own_error: one was raised by copying."""

    def __init__(self, blocks: dict[nn.Module, tuple]) -> None:
        alike: dict[tuple, list[nn.Module]] = {}
        for block, form in blocks.items():
            alike.setdefault(form, []).append(block)
        self._varying = {form: varying_numbers(members) for form, members in alike.items()}
        self._looked: dict[tuple, set[str]] = {form: set() for form in alike}
        self._records: dict[tuple, list[Record | None]] = {}
        self._copied: list[Record] = []
        self._graph: fx.Graph | None = None
        self.copied = 0
        self.own_error = False

    def call(
        self, block: nn.Module, form: tuple, forward: Callable, args: tuple, kwargs: dict
    ) -> Any:
        mode = proxy_tensor.get_proxy_mode()
        if mode is None or self._graph not in (None, mode.tracer.graph):
            return forward(*args, **kwargs)  # in the sub-graph of a higher-order operator
        self._graph = mode.tracer.graph
        with self._copying():
            numbers, varying = numbers_of(block), self._varying[form]
            call = BlockCall(block, mode.tracer, args, kwargs, numbers, varying)
            records = self._records.setdefault(self._key(form, call), [])
            known = records[0] if len(records) >= (2 if varying else 1) else None
            if known is not None and (sources := known.sources_in(call)) is not None:
                if not known.copies:
                    known.number = len(self._copied)
                    self._copied.append(known)
                self.copied += 1
                return known.copy(call, sources)
        if len(records) < (2 if varying else 1):
            return self._recorded(form, call, forward)
        return forward(*args, **kwargs)

    @contextmanager
    def _copying(self) -> Iterator[None]:
        """Around what is not the model's code; the trace's mode would see every size that is read."""
        try:
            with torch._C.DisableTorchFunction():
                yield
        except Exception:
            self.own_error = True
            raise

    def _key(self, form: tuple, call: BlockCall) -> tuple:
        looked = tuple((name, call.numbers[name]) for name in sorted(self._looked[form]))
        return form, looked, call.form()

    def _recorded(self, form: tuple, call: BlockCall, forward: Callable) -> Any:
        before = next(iter(reversed(call.tracer.graph.nodes)))
        with noticing(call.block, self._varying[form], self._looked[form]), call.watched_caches():
            output = forward(*call.args, **call.kwargs)
        with self._copying():
            return self._kept(form, call, before, output)

    def _kept(self, form: tuple, call: BlockCall, before: fx.Node, output: Any) -> Any:
        """Record what a call added after the node `before`, and return its output."""
        call.restore_nodes()
        record = Record.of(call, before, output)
        first, *_ = self._records.setdefault(self._key(form, call), []) or [record]
        if first is record:
            self._records[self._key(form, call)].append(record)
            return output
        if first is not None and record is not None and first.form == record.form:
            # numbers that are equal in both may matter all the same
            numbers = first.numbers, call.numbers
            self._looked[form] |= {n for n in self._varying[form] if numbers[0][n] == numbers[1][n]}
        else:
            first = None
        self._records[self._key(form, call)] = [first, record]
        return output

    def require_closed(self, outputs: Any) -> None:
        """Raise CaptureError if a value from inside a block that was copied has left it."""
        if any(record.escapes(outputs) for record in self._copied):
            raise CaptureError("a value from inside a block is used outside of it")

    def expand(self, graph: fx.Graph) -> None:
        """Make the copies for which one node stood in during the trace. graph: torch.export's."""
        for record in self._copied:
            if record.stand_ins:
                record.expand(graph)


def redirected(model: nn.Module) -> Replay:
    """Let the next trace of this model copy the nodes of blocks that are alike. model: a working
    copy, which is changed."""
    known = all(hasattr(proxy_tensor, name) for name in NEEDED)
    blocks = repeated_blocks(model) if known else {}
    replay = Replay(blocks)
    for block, form in blocks.items():
        _redirect(block, form, replay)
    forward = model.forward

    @wraps(forward)
    def checked(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        replay.require_closed(outputs)
        return outputs

    model.forward = checked
    return replay


def _redirect(block: nn.Module, form: tuple, replay: Replay) -> None:
    """Let calls of a block go through `replay`. The class changes, not an attribute, since
    torch.export may call a proxy that shares the block's attributes."""
    kind = type(block)

    @wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return replay.call(block, form, partial(kind.forward, self), args, kwargs)

    names = {"forward": forward, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    block.__class__ = type(kind.__name__, (kind,), names)
