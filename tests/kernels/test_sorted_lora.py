"""Sorted rows with LoRA experts beside each group's weight, against one row after the other."""

from itertools import product

import pytest
import torch
from kernel_inputs import close, gradients

from moe_rewrite.experts.lora.grouped_call import GroupedLoRACall, SortedLoRACall
from moe_rewrite.kernels.grouped_product import grouped_product
from moe_rewrite.kernels.lora.sorted_rows import lora_sorted

NAMES = ("x", "w", "scales", "a", "b")
SIZES = [  # rows, ends of the groups, I, O, R
    (9, [2, 2, 7, 9], 5, 7, 3), (9, [0, 3, 3, 6], 4, 3, 2), (1, [0, 1, 1], 8, 6, 8),
    (40, [1, 1, 31, 40], 6, 8, 1), (4, [0, 0], 3, 5, 2), (0, [0, 0, 0], 4, 4, 4),
]  # fmt: skip


def given(rows, ends, inside, out, rank, transposed=False):
    made = torch.Generator().manual_seed(rows + rank)

    def normal(*size):
        return torch.randn(*size, generator=made, dtype=torch.float64)

    groups = len(ends)
    w = normal(groups, out, inside).mT if transposed else normal(groups, inside, out)
    return {
        "x": normal(rows, inside), "w": w / inside**0.5, "scales": normal(rows, rank),
        "a": normal(rank, inside, groups) / inside**0.5, "b": normal(out, rank, groups),
    }  # fmt: skip


def run(op, ends):
    return lambda g: op(*(g[name] for name in NAMES), torch.tensor(ends, dtype=torch.int32))


def by_rows(x, w, scales, a, b, ends):
    made = []
    for at, row in enumerate(x):
        if at >= ends[-1]:
            made.append(row.sum() * w[0, 0] * 0)
            continue
        own = int((ends <= at).sum())
        made.append(row @ w[own] + b[..., own] @ (scales[at] * (a[..., own] @ row)))
    return (
        torch.stack(made) if made else x @ w[0] + 0 * (a.sum() + b.sum() + scales.sum() + w.sum())
    )


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_row_with_its_group(size, dtype, transposed):
    small = {k: v.to(dtype) for k, v in given(*size, transposed).items()}
    exact = {k: v.double() for k, v in small.items()}
    got, want = gradients(run(lora_sorted, size[1]), small), gradients(run(by_rows, size[1]), exact)
    close(got, want, dtype)


@pytest.mark.parametrize("trained", [("a", "b"), ("b",), ("x",), ("w", "scales"), ("x", "a", "b")])
@pytest.mark.parametrize("size", SIZES[:3], ids=str)
def test_what_is_frozen_gets_no_gradient(size, trained):
    found = []
    for op in (lora_sorted, by_rows):
        leaves = {k: v.requires_grad_(k in trained) for k, v in given(*size).items()}
        y = run(op, size[1])(leaves)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        found.append({k: leaves[k].grad for k in NAMES})
    for name, got in found[0].items():
        assert (got is not None) == (name in trained)
        torch.testing.assert_close(got, found[1][name])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bits_of_the_product_alone_while_b_is_zero(size):
    *rest, b = (t.float() for t in given(*size).values())
    x, w, ends = rest[0], rest[1], torch.tensor(size[1])
    assert torch.equal(lora_sorted(*rest, b.zero_(), ends), grouped_product(x, w, ends))


@pytest.mark.parametrize(("size", "grad"), list(product(SIZES[:4], [False, True])), ids=str)
def test_the_call_with_the_product_and_after_it(size, grad):
    """As one operation, after the product, and compiled; without experts, the product alone."""
    moe = pytest.importorskip("transformers.integrations.moe")
    assert moe is not None
    operator = torch.ops.transformers.grouped_mm_fallback.default
    rows, ends = size[0], torch.tensor(size[1], dtype=torch.int32)
    index = torch.arange(rows - 1, -1, -1)
    x, w, scales, a, b = (t.requires_grad_(grad) for t in given(*size).values())
    one, after = SortedLoRACall(operator), GroupedLoRACall(operator)
    whole = torch.compile(one, backend="aot_eager", fullgraph=True)
    want = after(operator(x, w, ends), x, scales, a, b, index, ends)
    for call in (one, whole):
        got = call(x, w, scales, a, b, index, ends)
        torch.testing.assert_close(got, want)
        if grad:
            for mine, theirs in zip(
                torch.autograd.grad(got.sum(), (x, w, scales, a, b)),
                torch.autograd.grad(want.sum(), (x, w, scales, a, b), retain_graph=True),
                strict=True,
            ):
                torch.testing.assert_close(mine, theirs)
    none = one(x, w, scales[:, :0], a[:0], b[:, :0], index, ends)
    assert torch.equal(none, operator(x, w, ends))
    meta = [t.detach().to("meta") for t in (x, w, scales, a, b)]
    assert one(*meta, index.to("meta"), ends.to("meta")).shape == want.shape
