"""Operators whose result a trace has computed before: the graph is the one without this memory."""

from __future__ import annotations

import threading
from contextlib import nullcontext

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from moe_rewrite.frontend import capture as capturing
from moe_rewrite.frontend.capture import capture
from moe_rewrite.frontend.choose_host import host_of
from moe_rewrite.frontend.tracing.fake_results import COMPUTES, remembered_results
from moe_rewrite.frontend.weights.structural_copy import structural_copy
from moe_rewrite.ir.aten import value
from tests.helpers import architectures
from tests.helpers.sweeps import some


def described(program):
    """Every node with what is known of its value, but for the names of sizes."""
    names = {}

    def size(number):
        for symbol in sorted(getattr(getattr(number, "node", None), "expr", number).free_symbols
                             if isinstance(number, torch.SymInt) else (), key=str):  # fmt: skip
            names.setdefault(str(symbol), f"size{len(names)}")
        text = str(number)
        for symbol, name in names.items():
            text = text.replace(symbol, name)
        return text

    def of(made):
        if isinstance(made, (list, tuple)):
            return [of(m) for m in made]
        if not isinstance(made, torch.Tensor):
            return size(made)
        sizes = [*made.shape, *made.stride(), made.storage_offset()]
        return [size(s) for s in sizes], made.dtype, made.device, made.requires_grad

    place = {n: i for i, n in enumerate(program.graph.nodes)}
    given = {n: fx.map_arg((n.args, dict(n.kwargs)), place.__getitem__) for n in place}
    return [(n.op, str(n.target), str(given[n]), of(value(n))) for n in place]


def captured(model, arguments, mode="eval"):
    host = host_of(structural_copy(model).train(mode == "train"))
    return capture(host, host.without_cache(dict(arguments)), mode)


NAMES = ["Llama", "GPT2", "Gemma3", "Bloom", "Bert", "ViT", "ConvNext"]


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", some(NAMES, {"Llama", "ConvNext"}))
def test_a_graph_is_the_same_without_it(name, mode, monkeypatch):
    model = architectures.build(name)
    arguments = host_of(model).example_inputs()
    with_it = captured(model, arguments, mode)
    monkeypatch.setattr(capturing, "remembered_results", nullcontext)
    without = captured(model, arguments, mode)
    assert described(with_it) == described(without)
    assert [str(r) for r in with_it.relations] == [str(r) for r in without.relations]


class Repeating(nn.Module):
    """Calls an operator twice on tensors that differ in one thing that its result depends on."""

    def __init__(self, pair):
        super().__init__()
        self.weight, self.pair = nn.Parameter(torch.randn(4, 4)), pair

    def forward(self, x):
        a, b = self.pair(x, self.weight)
        return a, b, a.shape[-1] + b.shape[-1]


PAIRS = {
    "sizes": lambda x, w: (x @ w, x[:, :2] @ w[:2]),
    "strides": lambda x, w: ((w @ w).clone(), (w @ w).t().clone()),
    "dtypes": lambda x, w: (x + 1, x.double() + 1),
    "constants": lambda x, w: (x.sum(0), x.sum(1)),
    "numbers": lambda x, w: (x.narrow(1, 0, 2), x.narrow(1, 1, 2)),
    "types of numbers": lambda x, w: (torch.full_like(x, 1), torch.full((4,), 1.0) + x),
    "signs of zero": lambda x, w: (x * 0.0, x * -0.0),
    "values": lambda x, w: (x[x > 0][:, None], x[x < 0][:, None]),
    "in place": lambda x, w: (x.clone().add_(1), x.clone().add_(1)[:, :1]),
    "itself": lambda x, w: (nn.functional.dropout(x, 0.5, False), x.contiguous()),
}  # fmt: skip


@pytest.mark.parametrize("kind", PAIRS)
def test_what_differs_is_computed_anew(kind, monkeypatch):
    model = Repeating(PAIRS[kind])
    arguments = {"x": torch.randn(3, 4)}
    with_it = captured(model, arguments)
    monkeypatch.setattr(capturing, "remembered_results", nullcontext)
    assert described(with_it) == described(captured(model, arguments))


def test_results_of_one_trace_are_tensors_of_their_own():
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with remembered_results(), mode:
        x = torch.empty(3, 4)
        first, second = x.relu(), x.relu()
        view, again = x.t(), x.t()
    assert first is not second and view is not again
    assert (second.shape, second.stride(), second.dtype) == (first.shape, first.stride(), x.dtype)
    assert (again.shape, again.stride()) == (view.shape, view.stride())
    assert second.fake_mode is mode and again.fake_mode is mode


def test_it_computes_once_and_in_its_own_thread_alone(monkeypatch):
    computed, compute = [], getattr(FakeTensorMode, COMPUTES)

    def counted(mode, func, *given):
        computed.append((threading.get_ident(), func))
        return compute(mode, func, *given)

    monkeypatch.setattr(FakeTensorMode, COMPUTES, counted)

    def run():
        with FakeTensorMode():
            x = torch.empty(3, 4)
            for _ in range(5):
                x.relu()

    with remembered_results():
        run()
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    run()
    relu = torch.ops.aten.relu.default
    ours = [t for t, func in computed if func is relu and t == threading.get_ident()]
    others = [t for t, func in computed if func is relu and t != threading.get_ident()]
    assert len(ours) == 1 + 5 and len(others) == 5
    assert getattr(FakeTensorMode, COMPUTES) is counted
