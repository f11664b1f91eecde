"""Export by segments: what is traced, which values pass between segments, what needs the whole."""

from functools import partial

import architectures
import networks
import pytest
import torch
from reference import randomize
from sweeps import some
from torch import fx, nn

import moe_rewrite
from moe_rewrite import TokenRouter
from moe_rewrite.errors import CaptureError, MoeRewriteError
from moe_rewrite.ir.structural_key import structural_key

onnx = pytest.importorskip("onnx")
from moe_rewrite.onnx.trace import segment_export
from moe_rewrite.onnx.trace.functional import FunctionalModel
from moe_rewrite.onnx.trace.segments import Segment, traced_target


@pytest.fixture
def traced(monkeypatch):
    """Names of the segments that are traced."""
    names = []
    trace = segment_export.onnx_program

    def noted(module, *args, **kwargs):
        names.append(module.segment.name)
        return trace(module, *args, **kwargs)

    monkeypatch.setattr(segment_export, "onnx_program", noted)
    return names


def exported(model, inputs, folder, split, **options):
    """(converted model, file) with experts that matter; the export verifies the file."""
    moe = moe_rewrite.convert(
        model, split=split, num_experts=2, example_inputs=inputs, verify=False, **options
    )
    randomize(moe)
    moe_rewrite.export_onnx(moe.eval(), folder / "m.onnx", example_inputs=inputs)
    return moe, moe_rewrite.onnx.load(folder / "m.onnx")


def assert_same(moe, loaded, inputs):
    with torch.no_grad():
        want = moe(inputs)
    got = next(iter(loaded(**{loaded.inputs[0]: inputs}).values()))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.sweep
def test_a_deep_model_takes_no_more_traces(traced, tmp_path):
    counts, nodes = [], []
    for layers in (6, 10):
        model = architectures.build("Llama", layers=layers)
        moe = moe_rewrite.convert(model, split=0.5, num_experts=2, verify=False)
        randomize(moe)
        report = moe_rewrite.export_onnx(moe.eval(), tmp_path / f"{layers}.onnx")
        assert report.max_error < 1e-4
        counts.append(len(traced))
        nodes.append(sum(report.operators.values()))
        traced.clear()
    assert counts[0] == counts[1] <= 6 and nodes[1] > 1.4 * nodes[0]


@pytest.mark.parametrize("kind", some(sorted(networks.KINDS), ["Attention"]))
def test_identical_layers_have_their_own_weights(kind, traced, tmp_path):
    model = networks.Network([kind] * 5).eval()
    moe, loaded = exported(model, model.input(2, 6), tmp_path, split=2)
    for batch, length in ((3, 7), (1, 4)):
        assert_same(moe, loaded, model.input(batch, length))
    assert len(traced) < len(FunctionalModel(moe, model.input(2, 6)).segments)


@pytest.mark.parametrize("name", some(["Llama", "GPT2"], []))
def test_open_experts_of_identical_layers(name, traced, tmp_path):
    """Their stacks are replaced by others with one more expert."""
    dense = architectures.build(name, layers=4)
    convert = partial(moe_rewrite.convert, dense, mode="upcycle", split=1, verify=False)
    moe, more = convert(num_experts=3).eval(), convert(num_experts=4).eval()
    randomize(moe, size=0.1)
    randomize(more, size=0.1, seed=1)
    moe_rewrite.export_onnx(moe, tmp_path / "m.onnx", open_experts=True)
    assert len(traced) < len(FunctionalModel(moe).segments)
    moe_rewrite.onnx.export_experts(more, tmp_path / "more.safetensors")
    ids = torch.randint(3, 97, (2, 7), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for model, experts in ((moe, None), (more, tmp_path / "more.safetensors")):
        loaded = moe_rewrite.onnx.load(tmp_path / "m.onnx", experts=experts)
        with torch.no_grad():
            want = model(**given).logits
        torch.testing.assert_close(loaded(**given)["logits"], want, rtol=1e-4, atol=1e-4)


class Scaled(nn.Module):
    """A layer with its own constant."""

    def __init__(self, by):
        super().__init__()
        self.linear, self.by = nn.Linear(8, 8), by

    def forward(self, x):
        return x + self.linear(x) * self.by


def test_layers_that_differ_in_a_constant_alone(traced, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(*(Scaled(by) for by in (0.5, 0.5, 2.0, 0.5, 0.5, 3.0, 3.0))).eval()
    moe, loaded = exported(model, torch.randn(2, 5, 8), tmp_path, split=3)
    assert_same(moe, loaded, torch.randn(3, 4, 8))
    assert 3 <= len(traced) < 7


class Carried(nn.Module):
    """Layers that add to a stream in its place."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x += torch.relu(layer(x))
        return x


def test_a_stream_that_is_written_in_place(traced, tmp_path):
    torch.manual_seed(0)
    moe, loaded = exported(Carried().eval(), torch.randn(2, 5, 8), tmp_path, split="layers.2")
    assert_same(moe, loaded, torch.randn(3, 4, 8))
    assert len(traced) > 1


def doubling(drops=()):
    def run(owned, taken):
        return [taken[0].mul_(2).sum(-1)]

    return Segment("doubles", (), ("x",), ("y",), run, object(), 2, writes=(0,), drops=drops)


def test_what_is_written_in_place_is_given_too():
    x, other = torch.randn(2, 3), torch.randn(4, 3)
    for drops, count in (((), 2), (("x",), 1)):
        made = [[t.sum(-1), t][:count] for t in (x, other)]
        module = segment_export.SegmentModule(doubling(drops), [[x], [other]], made, {})
        before = x.clone()
        given = module([x])
        torch.testing.assert_close(given[0], (2 * before).sum(-1))
        assert len(given) == count and torch.equal(x, before)
        if count == 2:
            torch.testing.assert_close(given[1], 2 * before)


def test_nothing_is_written_apart_from_a_view_of_it():
    x = torch.randn(2, 3)
    segment_export.require_own(doubling(), {"x": x, "y": x.clone()})
    with pytest.raises(CaptureError, match="doubles writes to x, of which another value is a view"):
        segment_export.require_own(doubling(), {"x": x, "y": x[:, :1]})


class Lengthened(nn.Module):
    """Layers that read a number computed from the length, which no graph of tensors has."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        scale = x.shape[1] ** 0.5
        for layer in self.layers:
            x = x + layer(x) * scale
        return x


def test_a_number_between_segments_needs_the_whole(traced, tmp_path):
    torch.manual_seed(0)
    moe, loaded = exported(Lengthened().eval(), torch.randn(2, 5, 8), tmp_path, split="layers.2")
    assert_same(moe, loaded, torch.randn(3, 9, 8))
    assert traced == ["layers.0-layers.3"]


class Counted(nn.Module):
    """Layers that read how many times sixteen positions there are: none, in short calls."""

    def __init__(self, kind):
        super().__init__()
        self.layers, self.kind = nn.ModuleList(nn.Linear(8, 8) for _ in range(8)), kind

    def forward(self, x):
        many = self.kind(x.shape[1] // 16)
        for layer in self.layers:
            x = x + torch.relu(layer(x)) + many
        return x


@pytest.mark.parametrize("kind", some([int, float], [float]))
def test_a_file_is_refused_sizes_that_its_graph_was_not_captured_for(kind, tmp_path):
    torch.manual_seed(0)
    moe, loaded = exported(Counted(kind).eval(), torch.randn(2, 9, 8), tmp_path, split=4)
    for length in (3, 15):
        assert_same(moe, loaded, torch.randn(3, length, 8))
    with pytest.raises(MoeRewriteError, match=r"\(3, 16, 8\): .* at most 15 in dimension 1"):
        loaded(x=torch.randn(3, 16, 8))


class Alternating(Counted):
    """Layers that branch on a length in a way that no bound says."""

    def forward(self, x):
        odd = x.shape[1] % 4 == 1
        for layer in self.layers:
            x = x + torch.relu(layer(x)) * (2 if odd else 1)
        return x


def test_a_model_that_branches_on_a_size_is_refused(tmp_path):
    moe = moe_rewrite.convert(
        Alternating(int).eval(), split=4, example_inputs=torch.randn(2, 9, 8), verify=False
    )
    with pytest.raises(CaptureError, match=r"x.shape\[1\] % 4\) == 1 does not hold"):
        moe_rewrite.export_onnx(moe, tmp_path / "m.onnx", example_inputs=torch.randn(2, 9, 8))
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_traced_in_segments_or_whole_is_refused(monkeypatch, tmp_path):
    def fails(*args, **kwargs):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(segment_export, "onnx_program", fails)
    with pytest.raises(CaptureError, match="RuntimeError: no such operator"):
        exported(networks.Network(["Mlp", "Mlp"]).eval(), torch.ones(2, 6).long(), tmp_path, 1)
    assert not list(tmp_path.iterdir())


def test_one_size_has_one_name(tmp_path):
    """The batch, which each segment has; only in the router's is the mask's batch the same."""
    model = architectures.build("Llama", layers=3)
    prefix = TokenRouter(granularity="prefix")
    moe = moe_rewrite.convert(model, split=1, num_experts=2, router=prefix, verify=False)
    report = moe_rewrite.export_onnx(moe, tmp_path / "m.onnx")
    assert report.inputs == dict.fromkeys(("input_ids", "attention_mask"), ["batch", "sequence"])
    assert report.outputs["logits"][:2] == ["batch", "sequence"]
    shapes = {
        d.dim_param
        for v in onnx.load(tmp_path / "m.onnx").graph.value_info
        for d in v.type.tensor_type.shape.dim
        if d.dim_param
    }
    assert {"batch", "sequence"} <= shapes and len(shapes) < 12


def code(steps, name="x"):
    graph = fx.Graph()
    value = graph.placeholder(name)
    for function, *others in steps:
        value = graph.call_function(function, (value, *others))
    graph.output((value,))
    return structural_key(graph, traced_target)


def test_code_is_the_same_whatever_it_is_called():
    add, mul = torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor
    steps = [(add, 1.0), (mul, 2)]
    assert code(steps) == code(steps, "another")
    for others in (
        [(add, 1), (mul, 2)],
        [(mul, 1.0), (add, 2)],
        [(add, 1.0)],
        [(add, 1.0), (mul, 3)],
    ):
        assert code(others) != code(steps)
