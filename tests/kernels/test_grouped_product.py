"""Sorted rows times their groups' weights: the bits of transformers' operator, forward and backward."""

import pytest
import torch

from moe_rewrite.kernels.grouped_product import grouped_product, in_eager

moe = pytest.importorskip("transformers.integrations.moe")
theirs = torch.ops.transformers.grouped_mm_fallback


def leaf(*size, trained=True):
    return torch.randn(*size, generator=torch.Generator().manual_seed(0)).requires_grad_(trained)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("rows", "ends"), [(9, [2, 2, 7, 9]), (9, [0, 3, 3, 6]), (4, [0, 0, 0, 0]), (0, [0, 0, 0, 0])]
)
def test_bits_of_transformers_operator(rows, ends, transposed):
    ends = torch.tensor(ends, dtype=torch.int32)
    found = []
    for product in (theirs, grouped_product):
        x, w = leaf(rows, 5), leaf(4, 3, 5) if transposed else leaf(4, 5, 3)
        y = product(x, w.transpose(1, 2) if transposed else w, ends)
        (y * torch.arange(3.0)).sum().backward()
        found.append((y.detach(), x.grad, w.grad))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("trained", [(True, False), (False, True), (False, False)])
def test_only_the_gradients_that_are_needed(trained):
    x, w = leaf(6, 5, trained=trained[0]), leaf(2, 5, 3, trained=trained[1])
    products = []
    original = torch.mm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "mm", lambda *a, **k: products.append(a) or original(*a, **k))
        y = grouped_product(x, w, torch.tensor([2, 6]))
        if any(trained):
            y.sum().backward()
    assert len(products) == 2 * (1 + sum(trained))
    assert (x.grad is not None, w.grad is not None) == trained


def test_it_stands_for_that_operator_alone():
    assert in_eager(theirs.default) is grouped_product
    assert in_eager(torch.ops.aten.mm.default) is torch.ops.aten.mm.default


def test_shapes_alone():
    made = grouped_product(leaf(6, 5).to("meta"), leaf(2, 5, 3).to("meta"), torch.tensor([2, 6]))
    assert made.is_meta and made.shape == (6, 3)
