"""A graph's steps as two generated functions, up to the cut and after it: no dictionary of values,
no calls of modules. They run where nobody asks a block to do more than its step (hooks, sharding,
checkpointing); see `BoundGraph.run`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from ...ir.program import Code
from ...ir.steps import Emitted
from ...utils.sharded import in_process_group, is_sharded
from .block_module import LAYERS, BlockModule, Bound, Slot
from .eager_code import eager_function

GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks",
                "_global_backward_hooks", "_global_backward_pre_hooks")  # fmt: skip
OWN_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
Steps = Sequence[tuple[BlockModule, Bound]]


class FlatCode:
    """shallow(leaves, None) returns the values `carried`, which the router or the deep half reads;
    deep(these and the plan's `views`, `Active` experts) returns the outputs that are values, then
    the layers' logits. Each clears the list that it is given."""

    def __init__(self, steps: Steps, emitted: Emitted, leaves: Sequence[str]) -> None:
        self.blocks = list(dict.fromkeys(block for block, _ in steps))
        self._names: dict[str, str] = {}
        self._codes: list[Callable] = []
        self._tables: list[dict[str, Any]] = []
        self._constants: list[Any] = []
        self._sites: list[Any] = []
        deep = [pair for pair in steps if pair[1].step.deep]
        shallow = [pair for pair in steps if not pair[1].step.deep]
        outputs = [o for o in emitted.outputs if isinstance(o, str)]
        outputs += [name for _, name in emitted.layers]
        read = {emitted.cut, *(t.node for t in emitted.tables), *outputs}
        read |= {name for _, bound in deep for name in bound.step.takes}
        known = {*leaves, *(name for _, bound in shallow for name in bound.step.gives)}
        self.carried = tuple(sorted(read & known))
        self.views = tuple(name for name, _ in emitted.views)
        self.outputs = tuple(outputs)
        self.shallow = self._function(shallow, leaves, self.carried)
        self.deep = self._function(deep, (*self.carried, *self.views), self.outputs)

    def _function(self, steps: Steps, takes: Sequence[str], gives: Sequence[str]) -> Callable:
        prepare: list[list[str]] = []
        owned: list[list[str]] = []
        last: dict[str, int] = {}  # what a site gave -> the last step with it
        for i, (_, bound) in enumerate(steps):
            prepare.append([])
            owned.append(self._owned_by(bound, prepare[-1]))
            last |= {name: i for name in map(_of_site, owned[-1]) if name}
        for name, i in last.items():  # what a site gave may be copies, for these steps alone
            if i + 1 < len(prepare):
                prepare[i + 1].insert(0, f"del {name}")
        return self._compiled(
            "run(given, active)", self._lines(steps, owned, takes, gives, prepare)
        )

    def _lines(
        self, steps: Steps, owned: list[list[str]], takes: Sequence[str], gives: Sequence[str],
        prepare: list[list[str]] | None = None,
    ) -> list[str]:  # fmt: skip
        """The body of a function. owned: each step's expressions of the tensors that it owns.
        prepare: lines that come before each step."""
        lines = [f"{self._tuple(takes)} = given"] if takes else []
        lines.append("given.clear()")  # so that a value is freed after its last use
        kept = set(gives)
        for i, (_, bound) in enumerate(steps):
            lines += prepare[i] if prepare else []
            values = [self._name(n) for n in bound.step.takes]
            called = f"c{self._position(self._codes, self._called(bound))}"
            call = f"{called}({', '.join([*owned[i], *values])})"
            lines.append(f"{self._tuple(bound.step.gives)} = {call}" if bound.step.gives else call)
            dropped = [self._name(n) for n in bound.step.drops if n not in kept]
            lines += [f"del {', '.join(dropped)}"] if dropped else []
        return [*lines, f"return {self._tuple(gives)}"]

    def _called(self, bound: Bound) -> Callable:
        """What runs a step."""
        return eager(bound.step.code)

    def _owned_by(self, bound: Bound, lines: list[str]) -> list[str]:
        """Expressions of the tensors that `_called` takes first. lines: that come before."""
        return [self._owned(ref, lines) for ref in bound.slots]

    def _compiled(self, head: str, lines: list[str]) -> Callable:
        body = "\n    ".join(lines)
        code = f"def {head}:\n    {body}\n"
        space: dict[str, Any] = {f"c{i}": c for i, c in enumerate(self._codes)}
        space |= {f"t{i}": t for i, t in enumerate(self._tables)}
        space |= {f"k{i}": k for i, k in enumerate(self._constants)}
        space |= {f"s{i}": s for i, s in enumerate(self._sites)}
        exec(compile(code, "<steps of a converted model>", "exec"), space)  # noqa: S102
        return space[head.partition("(")[0]]

    def _owned(self, ref: Any, lines: list[str]) -> str:
        """The expression of a tensor that code takes first; see `Bound.slots`."""
        if isinstance(ref, Slot):
            table = getattr(ref.module, ref.table)
            return f"t{self._position(self._tables, table)}[{ref.key!r}]"
        if type(ref) is tuple:
            site, part = ref
            known = len(self._sites)
            at = self._position(self._sites, site)
            if at == known:
                which = "on" if site.of_all else "run"
                lines.append(f"e{at} = s{at}.stacked(active.{which})")
            return f"e{at}[{part}]"
        return f"k{self._position(self._constants, ref)}"

    def _tuple(self, names: Sequence[str]) -> str:
        return "(" + "".join(f"{self._name(n)}, " for n in names) + ")"

    def _name(self, value: str) -> str:
        return self._names.setdefault(value, f"v{len(self._names)}")

    @staticmethod
    def _position(of: list[Any], value: Any) -> int:
        found = next((i for i, other in enumerate(of) if other is value), None)
        if found is None:
            of.append(value)
        return len(of) - 1 if found is None else found

    def applies(self) -> bool:
        """Whether every block is a plain module that only runs its step, on whole tensors."""
        if any(getattr(torch_module, name, None) for name in GLOBAL_HOOKS):
            return False
        if in_process_group() and self._sharded():
            return False
        return not torch.compiler.is_compiling() and all(map(_is_plain, self.blocks))

    def _sharded(self) -> bool:
        """Of the dense tensors: what sites give is whole."""
        return any(is_sharded(tensor) for table in self._tables for tensor in table.values())


def _of_site(expression: str) -> str | None:
    """The variable with what a site gave, in the expression of a tensor that a step owns."""
    name = expression.partition("[")[0]
    return name if name[0] in "er" else None


def eager(code: Code) -> Callable:
    """One function for all steps that share the code."""
    if code.eager is None:
        code.eager = eager_function(code.module)
    return code.eager


def _is_plain(block: nn.Module) -> bool:
    own = vars(block)
    kind = type(block)
    if kind is not BlockModule and LAYERS.get(kind.__name__) is not kind:
        return False
    if "forward" in own or own.get("_compiled_call_impl"):
        return False
    return not any(own[name] for name in OWN_HOOKS)
