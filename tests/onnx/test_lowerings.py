"""Exported feed-forward experts: each lowering against the converted model, with an idle expert."""

import pytest
import torch
from feedforwards import (
    BASE,
    BODIES,
    CHOICE,
    LAYERS,
    RAW,
    SIGMOID,
    TOP2,
    Gated,
    Net,
    Tanh,
    convert,
    inputs,
    made,
)  # fmt: skip
from reference import randomize
from sweeps import some

import moe_rewrite
from moe_rewrite.errors import ConfigError
from moe_rewrite.onnx.lowerings import choose
from moe_rewrite.onnx.lowerings.contrib import dequantized, interleaved, quantized
from moe_rewrite.onnx.trace.functional import FunctionalModel

pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
D, H = 8, 12


@pytest.mark.parametrize(
    "lowering,given,bodies",
    [
        ("sparse", TOP2, BODIES),
        pytest.param("dense", TOP2, BODIES[1:3], marks=pytest.mark.sweep),
        ("contrib", TOP2, (Gated, Tanh)),
        ("contrib", RAW, (Tanh,)),
        pytest.param("contrib", BASE, (Gated, Tanh), marks=pytest.mark.sweep),
        pytest.param("sparse", BASE, (Tanh,), marks=pytest.mark.sweep),
        ("sparse", CHOICE, (Gated,)),
        ("auto", RAW, (Tanh,)),
    ],
    ids=["sparse", "dense", "contrib", "contrib-raw", "contrib-base", "base", "choice", "auto"],
)
def test_file_is_the_model(lowering, given, bodies, tmp_path):
    moe = made(given, *bodies)
    path = tmp_path / "m.onnx"
    report = moe_rewrite.export_onnx(moe, path, lowering=lowering, example_inputs=inputs(2, 6))
    assert report.max_error < 1e-5
    loaded = moe_rewrite.onnx.load(path)
    for batch, length in ((1, 1), (3, 11)):
        x = inputs(batch, length, seed=length)
        gates = moe.route(x).gates.detach()
        if given is not CHOICE:
            assert float(gates[..., 1 + (given is BASE)].abs().max()) == 0.0
        torch.testing.assert_close(loaded(x=x)["output"], moe(x), rtol=1e-5, atol=1e-5)
    assert ("com.microsoft::MoE" in report.operators) == (lowering == "contrib")
    assert lowering in report.lowering or report.lowering.startswith("sparse (worst ratio")


@pytest.mark.parametrize(
    "lowering,given,bodies",
    [
        ("contrib", LAYERS, (Gated, Tanh)), ("sparse", SIGMOID, (Gated, Tanh)),
        pytest.param("sparse", LAYERS, BODIES, marks=pytest.mark.sweep),
        pytest.param("dense", LAYERS, (Gated,), marks=pytest.mark.sweep),
        pytest.param("contrib", SIGMOID, (Tanh,), marks=pytest.mark.sweep),
    ],
)  # fmt: skip
def test_layers_that_route_are_in_the_file(lowering, given, bodies, tmp_path):
    moe, path = made(given, *bodies), tmp_path / "m.onnx"
    report = moe_rewrite.export_onnx(moe, path, lowering=lowering, example_inputs=inputs(2, 6))
    assert report.max_error < 1e-5
    fused = report.operators.get("com.microsoft::MoE", 0)
    assert fused == (len(bodies) if lowering == "contrib" else 0)
    loaded = moe_rewrite.onnx.load(path)
    for batch, length in ((1, 1), (3, 11)):
        x = inputs(batch, length, seed=length)
        torch.testing.assert_close(loaded(x=x)["output"], moe(x), rtol=1e-5, atol=1e-5)
    chosen = {tuple(e) for p in moe.route(x).layers.values() for e in p.gates.nonzero()[:, 2:]}
    assert len(chosen) > 2


@pytest.mark.parametrize(
    "given", [TOP2, LAYERS, pytest.param(BASE, marks=pytest.mark.sweep)],
    ids=["top2", "layers", "base"],
)  # fmt: skip
def test_open_experts_are_replaced_by_more_of_them(given, tmp_path):
    """A file of experts alone, and one expert as an adapter, for a model that is deployed."""
    moe, path = made(given, Gated), tmp_path / "m.onnx"
    report = moe_rewrite.export_onnx(
        moe, path, open_experts=True, open_inputs=True, example_inputs=inputs(2, 6)
    )
    assert "one more than exported" in str(report) and report.lowering.startswith("open")
    more = convert(moe.to_dense(), verify=False, **given | {"num_experts": 6})
    randomize(more, seed=5)
    file, x = tmp_path / "more.safetensors", inputs(3, 9, seed=4)
    shapes = moe_rewrite.onnx.export_experts(more, file, inputs(2, 6))
    assert shapes["moe_rewrite.experts.layers.2.layers.2.up.weight"] == (6, H, D)
    loaded = moe_rewrite.onnx.load(path, experts=file)
    torch.testing.assert_close(loaded(x=x)["output"], more(x), rtol=1e-5, atol=1e-5)
    assert (more(x) - moe(x)).abs().max() > 0.01
    one = tmp_path / "one.onnx_adapter"
    moe_rewrite.onnx.export_adapter(more, "expert4", one, inputs(2, 6))
    adapter, options = ort.LoraAdapter(), ort.RunOptions()
    adapter.Load(str(one))
    options.add_active_adapter(adapter)
    got = moe_rewrite.onnx.load(path).session.run(None, {"x": x.numpy()}, options)[0]
    with more.use_expert("expert4"):
        torch.testing.assert_close(torch.from_numpy(got), more(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", some([8, 4], [4]))
def test_quantized_weights_are_compared_with_dequantized_ones(bits, tmp_path):
    moe = made(TOP2, Gated, Tanh)
    path = tmp_path / "m.onnx"
    report = moe_rewrite.export_onnx(moe, path, dtype=f"int{bits}", example_inputs=inputs(2, 6))
    assert report.operators["com.microsoft::QMoE"] == 2 and report.max_error < 1e-5
    x = inputs(3, 11, seed=2)
    want, got = moe(x).detach(), moe_rewrite.onnx.load(path)(x=x)["output"]
    error = float((got - want).abs().max() / want.abs().max())
    assert 1e-5 < error < {8: 0.02, 4: 0.2}[bits]


def test_rounding_is_by_row_and_half_a_step_at_most():
    weight = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    for bits in (8, 4):
        stored, scales = quantized(weight, bits)
        if bits == 4:
            stored = torch.stack([stored & 15, stored >> 4], dim=-1).flatten(-2)
        back = (stored.float() - 2 ** (bits - 1)) * scales.unsqueeze(-1)
        torch.testing.assert_close(back, dequantized(weight, bits))
        assert float(((back - weight).abs() / scales.unsqueeze(-1)).max()) < 0.5001
    with pytest.raises(ConfigError, match="even"):
        quantized(weight[..., :7], 4)
    both = interleaved(weight, weight + 1)
    assert torch.equal(both[:, 0::2], weight) and torch.equal(both[:, 1::2], weight + 1)


def test_what_does_not_fit_is_refused_with_the_reason(tmp_path):
    path = tmp_path / "m.onnx"
    for given, bodies, options, words in (
        (TOP2, BODIES[:1], {"lowering": "contrib"}, "'gelu': expected one of"),
        (TOP2, BODIES[2:3], {"lowering": "contrib"}, "none of the fused forms"),
        (CHOICE, (Gated,), {"lowering": "contrib"}, "experts choose"),
        (TOP2, (Gated,), {"lowering": "sparse", "dtype": "int8"}, "QMoE"),
        (TOP2, (Gated,), {"dtype": "int3"}, "int8"),
        (TOP2, (Gated,), {"lowering": "sparse", "open_experts": True}, "one lowering"),
    ):
        moe = convert(Net(*bodies).eval(), verify=False, **given)
        with pytest.raises(ConfigError, match=words):
            moe_rewrite.export_onnx(moe, path, example_inputs=inputs(2, 6), **options)
    assert not list(tmp_path.iterdir())


def test_auto_takes_the_fastest_by_measurement():
    moe = made(TOP2, Gated)
    functional = FunctionalModel(moe, inputs(2, 6))
    functional(functional.example, functional.tensors, [])
    (call,) = functional.calls
    for cell in choose.table():
        routing = choose.Routing(cell["experts"], cell["top_k"], False)
        chosen = choose.Choice("auto").of(call, routing)
        fastest = min(cell["milliseconds"].values())
        assert cell["milliseconds"][chosen.lowering] <= 1.1 * fastest, (cell, chosen)
    assert choose.Choice("auto").of(call, choose.Routing(4, 4, False)).lowering == "dense"
