"""How a converted model runs under torch.compile: block by block.

Choosing a graph, planning the routes and collecting tensors is Python, which no compiled code holds:
torch.compile skips it. Each step of a graph is a function of its tensors and values alone, and the
unit that is compiled: layers that are alike share one. Its guards are PyTorch's own.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ...ir.program import Code
from ...ir.steps import Emitted
from ...routing.plan_views import Active
from .block_module import Bound, Slot
from .eager_code import traced_function
from .flat_code import FlatCode, Steps


def compiles() -> bool:
    """Whether the frames that are called now are compiled by torch.compile."""
    callback = torch._C._dynamo.eval_frame.get_eval_frame_callback()
    return callback is not None and callback is not False


def outside(function: Callable, *args: Any) -> Any:
    """The result of a function that torch.compile leaves alone with all that it calls."""
    if not _left_alone:
        _left_alone.append(torch.compiler.disable(_called))
    return _left_alone[0](function, *args)


def _called(function: Callable, *args: Any) -> Any:
    return function(*args)


_left_alone: list[Callable] = []  # made on first use: it takes a second to import


def skipped(*functions: Callable) -> None:
    """Let torch.compile leave these functions alone, but compile what they call."""
    from torch._dynamo import decorators

    skip: Any = decorators.skip
    for function in (compiles, outside, *functions):
        skip(function)


class RegionalCode(FlatCode):
    """A graph's steps as functions that torch.compile takes one by one.

    `owned` gathers the tensors of the shallow or the deep half, in `outside`; `shallow` and `deep`
    take them as their second argument and return what `FlatCode` returns. A function is compiled for
    one case of small sizes, of gradients and of its weights' shapes, so that other cases, layers of
    other widths for example, are not counted as its recompilations.
    """

    def __init__(
        self, steps: Steps, emitted: Emitted, leaves: Sequence[str], case: tuple, recompute: bool
    ) -> None:
        """case: what compiled code is not shared across. recompute: in the backward pass, deep steps
        that write nothing."""
        self._case, self._recompute = case, recompute
        self._gather: list[Callable] = []
        super().__init__(steps, emitted, leaves)

    def owned(self, deep: bool, active: Active | None) -> list[Any]:
        return self._gather[deep](active)  # made in this order

    def _function(self, steps: Steps, takes: Sequence[str], gives: Sequence[str]) -> Callable:
        prepare: list[str] = []
        owned = [[self._owned(ref, prepare) for ref in bound.slots] for _, bound in steps]
        flat = "".join(f"{expression}, " for of_step in owned for expression in of_step)
        self._gather.append(self._compiled("gather(active)", [*prepare, f"return [{flat}]"]))
        numbers = count()
        names = [[f"o{next(numbers)}" for _ in of_step] for of_step in owned]
        every = "".join(f"{name}, " for of_step in names for name in of_step)
        lines = [f"[{every}] = owned", "owned.clear()"] + self._lines(steps, names, takes, gives)
        run = self._compiled("run(given, owned)", lines)
        skipped(run)
        return run

    def _called(self, bound: Bound) -> Callable:
        shapes = tuple(_form(ref) for ref in bound.slots)
        recompute = self._recompute and bound.step.deep and not bound.step.writes
        return _traced(bound.step.code, (self._case, shapes, recompute), recompute)


def _form(ref: Any) -> Any:
    """What compiled code rests on of a tensor that a step owns."""
    tensor = ref.get() if isinstance(ref, Slot) else ref
    return (tensor.shape, tensor.dtype) if isinstance(tensor, torch.Tensor) else None


def _traced(code: Code, case: tuple, recompute: bool) -> Callable:
    """A function of a case's own: torch.compile keeps what it compiled by code object."""
    if case not in code.traced:
        run = traced_function(code.module)
        code.traced[case] = _recomputed(run) if recompute else run
    return code.traced[case]


def _recomputed(run: Callable) -> Callable:
    def call(*args: Any) -> Any:
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=True)

    own = call.__code__.replace()
    return types.FunctionType(own, call.__globals__, closure=call.__closure__)
