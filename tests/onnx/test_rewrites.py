"""Rewrites of exported graphs: the same results from fewer nodes, and other forms left alone."""

import sys
from collections import Counter

import architectures
import numpy as np
import pytest
from reference import randomize

import moe_rewrite

onnx = pytest.importorskip("onnx")
import onnx_ir as ir
import onnxruntime

from moe_rewrite.onnx.rewrites import lora_matmul, rewrite

EXPERTS = {"a1", "a2", "b1", "b2"}


def sample(value):
    sizes = [d.dim_value or {"B": 2, "L": 5}[d.dim_param] for d in value.type.tensor_type.shape.dim]
    generator = np.random.default_rng(len(value.name) + ord(value.name[-1]))
    return generator.uniform(0.5, 2, sizes).astype(np.float32)


def rewritten(text, exact=False):
    """Operators of the rewritten graph, whose results were the first graph's."""
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 20]> g {text}')
    model = onnx.shape_inference.infer_shapes(model)
    feeds = {value.name: sample(value) for value in model.graph.input}
    want = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)
    changed = ir.from_proto(model)
    rewrite(changed, EXPERTS)
    made = ir.to_proto(changed)
    onnx.checker.check_model(made, full_check=True)
    assert [o.name for o in made.graph.output] == [o.name for o in model.graph.output]
    for got, expected in zip(
        onnxruntime.InferenceSession(made.SerializeToString()).run(None, feeds), want, strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=0 if exact else 1e-5)
    return Counter(node.op_type for node in made.graph.node)


ROOT = "(float[B, 3] x, float[B, 3] v) => (float[B, 3] y{more}) {{ s = Sqrt(v) r = Reciprocal(s) {then} }}"


@pytest.mark.parametrize(
    "then, more, divisions, left",
    [
        ("y = Mul(x, r)", "", 1, 0),
        ("y = Mul(r, r)", "", 1, 1),
        ("y = Mul(r, x)", ", float[B, 3] r", 1, 1),
        ("p = Mul(r, x) q = Mul(r, v) y = Add(p, q)", "", 2, 0),
        ("p = Mul(r, x) y = Add(p, r)", "", 1, 1),
        ("p = Reciprocal(v) y = Mul(x, p)", "", 0, 1),
    ],
)
def test_products_with_a_reciprocal_root(then, more, divisions, left):
    made = rewritten(ROOT.format(then=then, more=more))
    assert (made["Div"], made["Reciprocal"]) == (divisions, left)


TURN = """(float[B, L, 3] a, float[B, L, 5] b, float[L, 8] s, float[1, 1] t) => (float y) {{
    n = Neg(a) c = Concat<axis={axis}>({halves}) {then} }}"""


@pytest.mark.parametrize(
    "halves, then, negations",
    [
        ("n, b", "m = Mul(c, s) y = ReduceSum<keepdims=0>(m)", 0),
        ("n, b", "m = Mul(t, c) y = ReduceSum<keepdims=0>(m)", 0),
        ("n, b", "m = Mul(c, s) k = Mul(n, n) p = ReduceSum<keepdims=0>(m) q = ReduceSum<keepdims=0>(k) y = Add(p, q)", 1),
        ("n, b", "m = Add(c, s) y = ReduceSum<keepdims=0>(m)", 1),
        ("b, n", "m = Mul(c, s) y = ReduceSum<keepdims=0>(m)", 1),
        ("n, b", "m = Mul(c, c) y = ReduceSum<keepdims=0>(m)", 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("axis", [-1, 2])
def test_signs_of_half_of_the_features(halves, then, negations, axis):
    made = rewritten(TURN.format(axis=axis, halves=halves, then=then), exact=True)
    assert made["Neg"] == negations


def test_signs_are_folded_once_for_all_products_with_one_factor():
    made = rewritten("""(float[B, 3] a, float[B, 3] b, float[B, 6] s, float[6] t)
        => (float[B, 6] y, float[B, 6] z, float[B, 6] o) {
        n = Neg(a) c = Concat<axis=-1>(n, b) y = Mul(c, s)
        m = Neg(b) d = Concat<axis=-1>(m, a) z = Mul(d, s)
        e = Concat<axis=-1>(m, b) o = Mul(t, e) }""", exact=True)  # fmt: skip
    assert made == {"Mul": 3 + 2, "Concat": 3}


def test_order_of_turned_features_and_of_products_may_differ():
    made = rewritten("""(float[B, 3] a, float[B, 3] b, float[B, 6] t) => (float[B, 6] y, float[B, 6] z) {
        n = Neg(a) c = Concat<axis=-1>(n, b) m = Neg(b) d = Concat<axis=-1>(m, a)
        s = Sin(t) z = Mul(d, s) y = Mul(c, s) }""", exact=True)  # fmt: skip
    assert not made["Neg"]


def test_other_dimensions_and_unknown_sizes_keep_their_signs():
    rows = rewritten("""(float[3, 4] a, float[5, 4] b, float[8, 4] s) => (float[8, 4] y) {
        n = Neg(a) c = Concat<axis=0>(n, b) y = Mul(c, s) }""")  # fmt: skip
    unknown = rewritten("""(float[2, B] a, float[2, L] b, float[2, 1] s) => (float[2, N] y) {
        n = Neg(a) c = Concat<axis=-1>(n, b) y = Mul(c, s) }""")  # fmt: skip
    assert rows["Neg"] == unknown["Neg"] == 1


@pytest.mark.parametrize(
    "sizes, kept", [("B, L, 6", 0), ("B, L, 2, 3", 1), ("L, B, 6", 1), ("B, ?, 6", 1)]
)
def test_reshapes_to_the_same_shape(sizes, kept):
    """Sizes of the value that is made; where its words are unknown the node stays."""
    model = onnx.parser.parse_model("""<ir_version: 9, opset_import: ["" : 20]>
        g (float[B, L, 6] x, int64[N] s) => (float[M] y) { r = Reshape(x, s) q = Neg(r) y = Flatten(q) }""")
    shape = [None if d == "?" else int(d) if d.isdigit() else d for d in sizes.split(", ")]
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("r", 1, shape))
    changed = ir.from_proto(model)
    rewrite(changed, ())
    assert sum(node.op_type == "Reshape" for node in changed.graph) == kept


def lora(gates="B, L, 4", biased=False, other="4, 6", x="B, L, 6", read="x", more=""):
    """Two sites as the exporter writes them; the experts' products read `read`."""
    sites = []
    for i in (1, 2):
        base = (
            f"p{i} = MatMul(x, t{i}) q{i} = Add(p{i}, v{i})"
            if biased
            else f"q{i} = MatMul(x, t{i})"
        )
        sites.append(f"""t{i} = Transpose<perm=[1, 0]>(w{i}) {base}
            r{i} = Transpose<perm=[1, 0]>(a{i}) f{i} = MatMul({read}, r{i}) k{i} = Mul(f{i}, g{"2" * (other[0] != "4" and i == 2)})
            u{i} = Transpose<perm=[1, 0]>(b{i}) l{i} = MatMul(k{i}, u{i}) y{i} = Add(q{i}, l{i})""")
    return f"""(float[{x}] x, float[B, L, 6] z, float[{gates}] g, float[B, L, {other[0]}] g2,
        float[4, 6] a1, float[{other}] a2, float[7, 4] b1, float[3, {other[0]}] b2,
        float[7, 6] w1, float[3, 6] w2, float[7] v1, float[3] v2)
        => (float[B, L, 7] y1, float[B, L, 3] y2{more}) {{ {" ".join(sites)} }}"""


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("gates", ["B, L, 4", "B, 1, 4", "1, 1, 4"])
def test_low_rank_sites_are_one_first_product_and_one_more_each(gates, biased):
    made = rewritten(lora(gates, biased))
    assert made["MatMul"] == 3 and made["Mul"] == made["Split"] == 1
    assert made["Add"] == 2 * biased


@pytest.mark.parametrize(
    "options, products, why",
    [
        ({"gates": "B, L, 1"}, 4, "one gate for all ranks cannot be concatenated"),
        ({"other": "5, 6"}, 4, "other ranks are no even parts"),
        ({"read": "z", "x": "1, L, 6"}, 5, "the base has other rows"),
        ({"more": ", float[B, L, 7] q1"}, 4, "the base's product is read elsewhere"),
        ({"more": ", float[B, L, 7] l1"}, 4, "the experts' product is read elsewhere"),
        ({"more": ", float[B, L, 4] f1"}, 4, "what is gated is read elsewhere"),
    ],
)
def test_other_low_rank_sites_stay_apart(options, products, why):
    assert rewritten(lora(**options))["MatMul"] == products, why


def test_gates_between_the_products_and_weights_that_are_computed():
    made = rewritten("""(float[B, L, 6] x, float[B, L, 4] h, float[4, 6] a1, float[4, 6] a2,
        float[7, 4] b1, float[7, 6] v) => (float[B, L, 7] y, float[B, L, 4] k2) {
        s2 = Transpose<perm=[1, 0]>(a2) f2 = MatMul(x, s2)
        s1 = Transpose<perm=[1, 0]>(a1) f1 = MatMul(x, s1) g = Sqrt(h) k1 = Mul(f1, g)
        u = Transpose<perm=[1, 0]>(b1) l = MatMul(k1, u) w = Exp(v) t = Transpose<perm=[1, 0]>(w)
        q = MatMul(x, t) y = Add(q, l) k2 = Mul(g, f2) }""")
    assert made["MatMul"] == 3 and made["Split"] == 1


def test_large_weights_stay_apart(monkeypatch):
    monkeypatch.setattr(lora_matmul, "SMALL", 20)  # w1 has 42 elements, w2 18
    assert rewritten(lora())["MatMul"] == 4


def test_weights_of_the_dense_model_stay_apart(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "EXPERTS", ())
    assert rewritten(lora())["MatMul"] == 6


def optimized(path, to):
    """Operators of the graph that ONNX Runtime makes of a file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(to), 3
    onnxruntime.InferenceSession(str(path), options)
    return Counter(node.op_type for node in onnx.load(to).graph.node)


@pytest.mark.sweep  # tests/onnx/test_export.py exports a Llama in every run
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_exported_llama(tmp_path, dtype):
    moe = moe_rewrite.convert(
        architectures.build("Llama", layers=3), split=1, num_experts=2, verify=False
    )
    randomize(moe)
    path = tmp_path / "m.onnx"
    report = moe_rewrite.export_onnx(moe, path, dtype=dtype)
    apart = moe_rewrite.export_onnx(moe, tmp_path / "apart.onnx", dtype=dtype, open_inputs=True)
    made = optimized(path, tmp_path / "optimized.onnx")
    # two a layer and the last; the router reads the one after the cut without its weight
    assert made["SimplifiedLayerNormalization"] == 6 and report.operators["Sqrt"] == 7
    assert not {"Reciprocal", "Neg"} & report.operators.keys()
    # of seven sites a layer, four have an input that no other site has
    assert apart.operators["MatMul"] - report.operators["MatMul"] == 2 * (7 - 4 + 7)
