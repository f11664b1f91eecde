"""The fused linear map with LoRA experts: against the float64 reference, forward and backward."""

import pytest
import torch
from kernel_inputs import close, gradients

from moe_rewrite.kernels.lora.op import _lora, lora_linear
from moe_rewrite.kernels.lora.reference import lora_linear as reference

SHAPES = [
    # leading dimensions of x, of the scales, D, O, ranks
    ((13,), (13,), 5, 7, [3, 3]), ((2, 3), (2, 1), 8, 3, [4]), ((4, 5), (), 6, 6, [1, 2, 5]),
    ((0,), (0,), 4, 3, [2]), ((2, 2, 3), (2, 1, 1), 16, 24, [8, 1]), ((5,), (1,), 3, 4, [0]),
]  # fmt: skip


def inputs(lead, given, D, O, ranks, bias=True, apart=True, seed=0):  # noqa: E741
    torch.manual_seed(seed)
    R = sum(ranks)
    found = {"x": torch.randn(*lead, D), "weight": torch.randn(O, D) / D**0.5}
    found["scales"] = torch.rand(*given, R)
    a, b = torch.randn(R, D) / D**0.5, torch.randn(O, R)
    found |= {"a": a.split(ranks), "b": b.split(ranks, 1)} if apart else {"a": a, "b": b}
    found |= {"bias": torch.randn(O)} if bias else {}
    return {
        k: [t.double() for t in v] if isinstance(v, tuple) else v.double() for k, v in found.items()
    }


def run(op):
    return lambda g: op(g["x"], g["weight"], g.get("bias"), g["scales"], g["a"], g["b"])


def leaves(given, wanted):
    made = {}
    for name, v in given.items():
        on = name in wanted
        made[name] = (
            [t.clone().requires_grad_(on and i == len(v) - 1) for i, t in enumerate(v)]
            if isinstance(v, list) else v.clone().requires_grad_(on)
        )  # fmt: skip
    return made


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_the_reference(shape, dtype):
    given = inputs(*shape, bias=len(shape[0]) != 2, apart=False, seed=sum(shape[4]))
    small = {k: v.to(dtype) for k, v in given.items()}
    exact = {k: v.double() for k, v in small.items()}
    close(gradients(run(lora_linear), small), gradients(run(reference), exact), dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("wanted", ["ab", "a", "b", ("x", "scales"), ("a", "b", "x", "scales")])
def test_only_what_is_asked_for(shape, wanted):
    """Of lists, the last part is trained; every other gradient stays None."""
    given = inputs(*shape, seed=len(wanted))
    grads = []
    for op in (lora_linear, reference):
        found = leaves(given, wanted)
        y = run(op)(found)
        assert y.requires_grad
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
        flat = {
            f"{k}{i}": t for k, v in found.items() if isinstance(v, list) for i, t in enumerate(v)
        }
        flat |= {k: v for k, v in found.items() if isinstance(v, torch.Tensor)}
        grads.append({k: t.grad for k, t in flat.items()} | {"y": y.detach()})
    for name, got in grads[0].items():
        expected = grads[1][name]
        assert (got is None) == (expected is None), name
        if got is not None:
            torch.testing.assert_close(got, expected, msg=name)


def test_a_transposed_weight_and_rows_that_are_not_contiguous():
    given = inputs((6, 4), (6, 4), 5, 7, [2, 2])
    given["weight"] = given["weight"].t().contiguous().t()
    given["x"] = given["x"].transpose(0, 1).contiguous().transpose(0, 1)
    for op in (lora_linear, torch.compile(lora_linear, backend="aot_eager", fullgraph=True)):
        torch.testing.assert_close(run(op)(given), run(reference)(given))


@pytest.mark.parametrize("wanted", ["ab", ("a", "b", "x", "weight", "bias", "scales"), ()])
def test_opcheck(wanted):
    found = leaves(inputs((3, 2), (3, 1), 4, 5, [2, 1]), wanted)
    args = (*(found[k] for k in ("x", "weight", "bias", "scales", "a", "b")), bool(wanted))
    torch.library.opcheck(_lora, args)


def test_a_compiled_step_gives_the_same():
    given = inputs((5, 3), (5, 1), 8, 6, [2, 2], seed=4)
    grads = []
    for op in (lora_linear, torch.compile(lora_linear, backend="aot_eager", fullgraph=True)):
        found = leaves(given, ("a", "b", "x", "scales"))
        run(op)(found).square().sum().backward()
        grads.append(
            [found["a"][-1].grad, found["b"][-1].grad, found["x"].grad, found["scales"].grad]
        )
        assert found["a"][0].grad is None
    for got, expected in zip(*reversed(grads), strict=True):
        torch.testing.assert_close(got, expected)


def test_what_follows_may_change_the_output_in_place():
    """As a graph's in-place activations do; a product with a bias alone would be a view."""
    for lead in [(1, 5), (2, 5), (5,)]:
        grads = []
        for op in (lora_linear, reference):
            found = leaves(inputs(lead, lead, 4, 6, [2]), "ab")
            run(op)(found).mul_(0.5).square().sum().backward()
            grads.append((found["a"][-1].grad, found["b"][-1].grad))
        torch.testing.assert_close(*grads)


def test_an_export_sees_plain_products():
    class Site(torch.nn.Module):
        def forward(self, x, weight, scales, a, b):
            return lora_linear(x, weight, None, scales, a, b)

    given = inputs((3, 4), (3, 1), 5, 6, [2, 2], bias=False)
    args = tuple(given[k] for k in ("x", "weight", "scales", "a", "b"))
    exported = torch.export.export(Site(), args)
    names = {str(n.target) for n in exported.graph.nodes if n.op == "call_function"}
    assert names and not any("moe_rewrite" in n for n in names)
    torch.testing.assert_close(
        exported.module()(*args), lora_linear(args[0], args[1], None, *args[2:])
    )


@pytest.mark.parametrize(("change", "words"), [
    ({"x": torch.zeros(3, 4)}, "expected .*, D"), ({"bias": torch.zeros(4)}, "bias"),
    ({"a": []}, "at least one"), ({"scales": torch.zeros(2, 5)}, "scales"),
    ({"b": [torch.zeros(7, 2)]}, "parts of A"), ({"scales": torch.zeros(3)}, "scales"),
    ({"scales": torch.rand(6).float()}, "dtype"),
])  # fmt: skip
def test_misfits_are_refused(change, words):
    given = inputs((13,), (13,), 5, 7, [3, 3]) | change
    with pytest.raises(ValueError, match=words):
        run(lora_linear)(given)
