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

import moe_rewrite
from moe_rewrite.onnx.trace import quiet
from moe_rewrite.traces import frugal_traces


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


def test_sizes_that_need_hundreds_of_others_are_exported(tmp_path):
    model, x = nn.Sequential(Chained(0), Chained(400)).eval(), torch.randn(2, 5, 8)
    moe = moe_rewrite.convert(model, split=1, num_experts=2, example_inputs=x, verify=False)
    report = moe_rewrite.export_onnx(moe, tmp_path / "m.onnx", example_inputs=x)
    assert len(report.checks) > 1
