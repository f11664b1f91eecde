"""A conversion and an export let go of the graphs that they traced."""

import gc
import weakref
from collections import Counter

import networks
import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.fx import graph_module
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.sym_node import SymNode

import moe_rewrite
from moe_rewrite import traces
from moe_rewrite.onnx.trace import quiet
from moe_rewrite.traces import collecting, frugal_traces


@pytest.fixture
def graphs(monkeypatch):
    """Weak references to the graphs of all traces that come."""
    found = []
    export, decompose = torch.export.export, ExportedProgram.run_decompositions

    def kept(run):
        def traced(*args, **kwargs):
            made = run(*args, **kwargs)
            found.append(weakref.ref(made.graph))
            return made

        return traced

    monkeypatch.setattr(torch.export, "export", kept(export))
    monkeypatch.setattr(ExportedProgram, "run_decompositions", kept(decompose))
    return found


def test_no_graph_of_a_trace_stays(graphs, tmp_path):
    model = networks.Network(["Mlp", "Attention", "Mlp"]).eval()
    moe = moe_rewrite.convert(
        model, split=1, num_experts=2, example_inputs=model.input(2, 6), verify=False
    )
    captured, sources = len(graphs), set(graph_module._loader.eval_cache)
    moe_rewrite.export_onnx(moe, tmp_path / "m.onnx", example_inputs=model.input(2, 6))
    assert captured and len(graphs) >= captured + 2
    assert set(graph_module._loader.eval_cache) == sources
    gc.collect()
    assert not [g() for g in graphs[captured:] if g() is not None]


class Chained(nn.Module):
    """Rows scaled by the last of many sizes, each of which needs the one before it."""

    def __init__(self, sizes):
        super().__init__()
        self.up, self.down, self.sizes = nn.Linear(8, 16), nn.Linear(16, 8), sizes

    def forward(self, x):
        size = x.shape[1]
        for _ in range(self.sizes):
            size = size + x.shape[0]
            size = size - x.shape[0] + 1
        return x + self.down(torch.relu(self.up(x))) / x.new_ones(size).sum()


def test_lazy_sizes_make_few_nodes(monkeypatch):
    made, create = Counter(), torch.fx.Graph.create_node

    def counted(graph, *args, **kwargs):
        made[lazy] += 1
        return create(graph, *args, **kwargs)

    monkeypatch.setattr(torch.fx.Graph, "create_node", counted)
    model = networks.Network(["Attention", "Mlp"] * 2).eval()
    graphs = []
    for lazy in (True, False):
        with torch.no_grad(), quiet(), frugal_traces(lazy):
            exported = torch.export.export(
                model, (model.input(2, 6),), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},)
            ).run_decompositions()
        graphs.append(Counter(str(n.target) for n in exported.graph.nodes))
    assert graphs[0] == graphs[1]
    assert made[True] < 0.8 * made[False], made


def live_sizes(monkeypatch):
    """How many objects of sizes an export's largest trace has at its end."""
    trace, found = proxy_tensor.PythonKeyTracer.trace, []

    def counted(*args, **kwargs):
        graph = trace(*args, **kwargs)
        gc.collect()
        found.append(sum(type(o) is SymNode for o in gc.get_objects()))
        return graph

    model = networks.Network(["Attention", "Mlp"] * 2).eval()
    lazy = frugal_traces(lazy_sizes=True)
    with monkeypatch.context() as patch, torch.no_grad(), quiet(), collecting(), lazy:
        patch.setattr(proxy_tensor.PythonKeyTracer, "trace", counted)
        torch.export.export(
            model, (model.input(2, 6),), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},)
        ).run_decompositions()
    return max(found)


def test_sizes_that_no_node_needs_are_let_go_of(monkeypatch):
    few = live_sizes(monkeypatch)
    monkeypatch.setattr(traces, "SIZES", "a name that is gone")
    assert few < 0.5 * live_sizes(monkeypatch)


class Cycle:
    def __init__(self):
        self.own = self


def test_only_young_objects_are_collected():
    old, kept = weakref.ref(Cycle()), Cycle()
    with collecting():
        assert old() is None and gc.get_freeze_count() > 10_000
        kept, passed = None, weakref.ref(kept)
        young = weakref.ref(Cycle())
        gc.collect()
        assert young() is None and passed() is not None
        young = weakref.ref(Cycle())
    assert young() is None and gc.get_freeze_count() == 0
    gc.collect()
    assert passed() is None


def test_what_the_user_froze_stays_frozen():
    cycle = Cycle()
    kept = weakref.ref(cycle)
    gc.freeze()
    del cycle
    try:
        with collecting():
            assert kept() is not None
        gc.collect()
        assert kept() is not None and gc.get_freeze_count()
    finally:
        gc.unfreeze()
    gc.collect()
    assert kept() is None


def test_sizes_that_need_hundreds_of_others_are_exported(tmp_path):
    model, x = nn.Sequential(Chained(0), Chained(400)).eval(), torch.randn(2, 5, 8)
    moe = moe_rewrite.convert(model, split=1, num_experts=2, example_inputs=x, verify=False)
    report = moe_rewrite.export_onnx(moe, tmp_path / "m.onnx", example_inputs=x)
    assert len(report.checks) > 1
