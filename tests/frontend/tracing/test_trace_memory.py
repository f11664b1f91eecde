"""Conversion and export free the graphs that they traced."""

import gc
import weakref

import networks
import pytest
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import graph_module

import moe_rewrite
from moe_rewrite.errors import CaptureError
from moe_rewrite.frontend.tracing.trace_memory import OFTEN, STACKS, tracing
from moe_rewrite.onnx import low_memory_export
from moe_rewrite.onnx.trace import torch_export


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


def test_no_graph_of_a_trace_stays_in_low_memory(graphs, tmp_path):
    model = networks.Network(["Mlp", "Attention", "Mlp"]).eval()
    with low_memory_export():
        moe = moe_rewrite.convert(
            model, split=1, num_experts=2, example_inputs=model.input(2, 6), verify=False
        )
        captured, sources = len(graphs), set(graph_module._loader.eval_cache)
        moe_rewrite.export_onnx(moe, tmp_path / "m.onnx", example_inputs=model.input(2, 6))
    assert captured and len(graphs) >= captured + 2
    assert set(graph_module._loader.eval_cache) == sources
    gc.collect()
    assert not [g() for g in graphs[captured:] if g() is not None]


def of_the_process():
    """Process-wide state: the collector's settings, functions, and caches."""
    from sympy.core.cache import CACHE
    from torch.export import _trace
    from torch.fx.experimental import symbolic_shapes

    kept = [symbolic_shapes.safe_expand, symbolic_shapes.uninteresting_files]
    return {
        "collector": (gc.get_threshold(), gc.get_freeze_count(), gc.isenabled()),
        "functions": (dict(vars(_trace)), dict(vars(torch.export)), dict(vars(torch.fx.config))),
        "caches": tuple(f.cache_info().currsize > 0 for f in (*kept, *CACHE)),
        "sources": len(graph_module._loader.eval_cache) > 0,
    }


def test_a_plain_conversion_leaves_the_process_as_it_was(monkeypatch):
    """Its collector is not frozen, its thresholds are restored, no cache of others is emptied."""
    from sympy.core import cache
    from torch.fx.experimental import symbolic_shapes

    model = networks.Network(["Mlp", "Attention", "Mlp"]).eval()
    moe_rewrite.convert(model, split=1, example_inputs=model.input(2, 6))  # fills the caches
    emptied = []
    monkeypatch.setattr(cache, "clear_cache", lambda: emptied.append("sympy"))
    monkeypatch.setattr(gc, "freeze", lambda: emptied.append("freeze"))
    hits, before = symbolic_shapes.safe_expand.cache_info().hits, of_the_process()
    assert all(before["caches"][:2]) and before["sources"]
    moe_rewrite.convert(model, split=1, example_inputs=model.input(2, 6), num_experts=2)
    moe_rewrite.convert(model, split=2, example_inputs=model.input(2, 6))(model.input(3, 4))
    assert of_the_process() == before and emptied == []
    assert symbolic_shapes.safe_expand.cache_info().hits > hits


class Fixed(nn.Module):
    """Scales by a value that depends on sizes only, without gradients: the trace has a subgraph."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        with torch.no_grad():
            scale = torch.cos(torch.arange(x.shape[1], device=x.device, dtype=x.dtype))
        return x + self.linear(x) * scale[:, None]


@pytest.fixture
def tables(monkeypatch):
    """Weak references to the tables of sizes of all captures that come."""
    found, export = [], torch.export.export

    def traced(*args, **kwargs):
        made = export(*args, **kwargs)
        inputs = [n.meta["val"] for n in made.graph.nodes if n.op == "placeholder"]
        found.append(weakref.ref(inputs[-1].fake_mode.shape_env))
        return made

    monkeypatch.setattr(torch.export, "export", traced)
    return found


@pytest.mark.sweep
def test_no_table_of_sizes_stays_in_low_memory(tables, tmp_path):
    model, x = nn.Sequential(Fixed(), Fixed(), Fixed()).eval(), torch.randn(2, 5, 8)
    with low_memory_export():
        moe = moe_rewrite.convert(model, split=1, num_experts=2, example_inputs=x)
        counts = [len(tables)]
        moe(x.double().float().requires_grad_())
        moe.double()(x.double())
        counts.append(len(tables))
        moe.float()
        moe_rewrite.export_onnx(moe, tmp_path / "m.onnx", example_inputs=x)
        counts.append(len(tables))
    gc.collect()
    assert 0 < counts[0] < counts[1] < counts[2]
    assert not [table for table in tables if table() is not None]
    assert torch.isfinite(moe(x)).all()


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.fixture
def all_tables(monkeypatch):
    """Weak references to all tables of sizes that come."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    found, init = [], ShapeEnv.__init__
    monkeypatch.setattr(
        ShapeEnv,
        "__init__",
        lambda self, *a, **k: found.append(weakref.ref(self)) or init(self, *a, **k),
    )
    return found


def test_a_failed_capture_leaves_no_table_of_sizes_in_low_memory(all_tables):
    class Whole(nn.Sequential):
        def forward(self, x):
            return Branching.forward(self, super().forward(x))

    model = Whole(nn.Linear(8, 8), nn.Linear(8, 8))
    with low_memory_export(), pytest.raises(CaptureError):
        moe_rewrite.convert(model, split=1, example_inputs=torch.randn(2, 5, 8))
    gc.collect()
    assert all_tables and not [table for table in all_tables if table() is not None]


@pytest.mark.parametrize("emitted", [True, False])
def test_settings_of_traces_are_put_back(emitted, monkeypatch):
    monkeypatch.setattr(torch.fx.config, STACKS, emitted, raising=False)
    with pytest.raises(ValueError), tracing():
        assert getattr(torch.fx.config, STACKS)
        raise ValueError
    assert getattr(torch.fx.config, STACKS) == emitted
    monkeypatch.delattr(torch.fx.config, STACKS)
    with tracing():
        pass
    assert not hasattr(torch.fx.config, STACKS)


@pytest.mark.sweep
def test_one_table_of_translations_serves_all_exports(monkeypatch, tmp_path):
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    made, make = [], ONNXRegistry.from_torchlib
    monkeypatch.setattr(torch_export, "_tables", {})
    monkeypatch.setattr(ONNXRegistry, "from_torchlib", lambda **k: made.append(k) or make(**k))
    model = networks.Network(["Mlp", "Attention", "Mlp"]).eval()
    x = model.input(2, 6)
    moe = moe_rewrite.convert(model, split=1, num_experts=2, example_inputs=x, verify=False)
    for _ in range(2):
        moe_rewrite.export_onnx(moe, tmp_path / "m.onnx", example_inputs=x)
    assert len(made) == 1
    (table,) = torch_export._tables.values()
    ours = [d for found in table.functions.values() for d in found if d.is_custom]
    assert not ours  # which PyTorch puts into the table that it is given


class Cycle:
    def __init__(self):
        self.own = self


def test_only_young_objects_are_collected():
    old, kept = weakref.ref(Cycle()), Cycle()
    with low_memory_export():
        assert old() is None and gc.get_freeze_count() > 10_000
        kept, passed = None, weakref.ref(kept)
        young = weakref.ref(Cycle())
        gc.collect()
        assert young() is None and passed() is not None
        young = weakref.ref(Cycle())
    assert young() is None and gc.get_freeze_count() == 0
    gc.collect()
    assert passed() is None


@pytest.mark.parametrize("usual", [(700, 10, 10), (0, 5, 5)])
def test_thresholds_of_the_collector_are_put_back(usual):
    """0: the user wants no collection by itself."""
    before = gc.get_threshold()
    gc.set_threshold(*usual)
    try:
        with pytest.raises(ValueError), low_memory_export():
            assert gc.get_threshold() == (OFTEN if usual[0] else usual)
            raise ValueError
        assert gc.get_threshold() == usual
    finally:
        gc.set_threshold(*before)


def test_what_the_user_froze_stays_frozen():
    cycle = Cycle()
    kept = weakref.ref(cycle)
    gc.freeze()
    del cycle
    try:
        with low_memory_export():
            assert kept() is not None
        gc.collect()
        assert kept() is not None and gc.get_freeze_count()
    finally:
        gc.unfreeze()
    gc.collect()
    assert kept() is None


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


@pytest.mark.sweep
def test_sizes_that_need_hundreds_of_others_are_exported(tmp_path):
    model, x = nn.Sequential(Chained(0), Chained(400)).eval(), torch.randn(2, 5, 8)
    moe = moe_rewrite.convert(model, split=1, num_experts=2, example_inputs=x, verify=False)
    report = moe_rewrite.export_onnx(moe, tmp_path / "m.onnx", example_inputs=x)
    assert len(report.checks) > 1
