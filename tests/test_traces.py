"""A conversion and an export let go of the graphs that they traced."""

import gc
import weakref

import networks
import pytest
import torch
from torch.export import ExportedProgram

import moe_rewrite


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
    captured = len(graphs)
    moe_rewrite.export_onnx(moe, tmp_path / "m.onnx", example_inputs=model.input(2, 6))
    assert captured and len(graphs) >= captured + 2
    gc.collect()
    assert not [g() for g in graphs[captured:] if g() is not None]
