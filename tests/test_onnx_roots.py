"""Root-mean-square norms: written as ONNX Runtime fuses them, and nothing else changed."""

from collections import Counter

import architectures
import numpy as np
import pytest

import moe_rewrite

onnx = pytest.importorskip("onnx")
import onnx_ir as ir  # noqa: E402  (where onnx is there)
import onnxruntime  # noqa: E402

from moe_rewrite.onnx.roots import divide_by_roots  # noqa: E402

NORM = "SimplifiedLayerNormalization"


def optimized(path, to):
    """Operators of the graph that ONNX Runtime makes of a file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(to), 3
    onnxruntime.InferenceSession(str(path), options)
    return Counter(node.op_type for node in onnx.load(to).graph.node)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_norms_of_an_exported_model_are_one_operator(tmp_path, dtype):
    model = architectures.build("Llama", layers=3)
    moe = moe_rewrite.convert(model, split=1, num_experts=2, verify=False)
    path = tmp_path / "m.onnx"
    report = moe_rewrite.export_onnx(moe, path, dtype=dtype)
    made = optimized(path, tmp_path / "optimized.onnx")
    # two a layer and the last; the router reads the one behind the cut without its weight
    assert made[NORM] == 6 and report.operators["Sqrt"] == 7
    assert not made["Reciprocal"] and "Reciprocal" not in report.operators


def graph(text):
    head = '<ir_version: 9, opset_import: ["" : 20]> g (float[N, 3] x, float[N, 3] v) => '
    return ir.from_proto(onnx.parser.parse_model(head + text))


def outputs(model, x, v):
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    return session.run(None, {"x": x, "v": v})


@pytest.mark.parametrize(
    "text, divisions, left",
    [
        ("(float[N, 3] y) { s = Sqrt(v) r = Reciprocal(s) y = Mul(x, r) }", 1, 0),
        ("(float[N, 3] y) { s = Sqrt(v) r = Reciprocal(s) y = Mul(r, r) }", 1, 1),
        ("(float[N, 3] y, float[N, 3] r) { s = Sqrt(v) r = Reciprocal(s) y = Mul(r, x) }", 1, 1),
        ("(float[N, 3] y) { s = Sqrt(v) r = Reciprocal(s) p = Mul(r, x) q = Mul(r, v) y = Add(p, q) }", 2, 0),
        ("(float[N, 3] y) { s = Sqrt(v) r = Reciprocal(s) p = Mul(r, x) y = Add(p, r) }", 1, 1),
        ("(float[N, 3] y) { r = Reciprocal(v) y = Mul(x, r) }", 0, 1),
    ],
)  # fmt: skip
def test_products_with_a_reciprocal_root(text, divisions, left):
    model = graph(text)
    generator = np.random.default_rng(0)
    x, v = generator.standard_normal((4, 3)), generator.uniform(0.5, 2, (4, 3))
    x, v = x.astype(np.float32), v.astype(np.float32)
    want = outputs(model, x, v)
    divide_by_roots(model.graph)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    for got, expected in zip(outputs(model, x, v), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    made = Counter(node.op_type for node in model.graph)
    assert (made["Div"], made["Reciprocal"]) == (divisions, left)
