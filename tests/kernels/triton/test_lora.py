"""The low-rank kernel and the op around it: against the float64 reference, forward and backward."""

import pytest
import torch
from kernel_inputs import close, gradients, lora_inputs, run_lora
from sentinels import guarded
from sweeps import some

from moe_rewrite.kernels import tile_sizes
from moe_rewrite.kernels.lora import launch, stacked
from moe_rewrite.kernels.lora.op import lora_linear
from moe_rewrite.kernels.lora.reference import lora_linear as reference

pytestmark = pytest.mark.usefixtures("on_device")

SHAPES = [
    # leading dimensions of x, of the scales, D, O, R
    ((37,), (37,), 20, 33, 6), ((2, 3), (2, 1), 8, 3, 4), ((4, 5), (), 48, 16, 40),
    ((1,), (1,), 5, 70, 1), ((0,), (0,), 4, 3, 2), ((18,), (18,), 16, 16, 0),
    ((20,), (20,), 17, 18, 256),
]  # fmt: skip


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(tile_sizes, "product", lambda *_: tile_sizes.TileSizes(16, 16, 16, 4, 2))
    monkeypatch.setattr(tile_sizes, "ranks", lambda *_: 16)
    monkeypatch.setattr(stacked, "fuses", lambda dy, weight: dy.numel() > 0 < weight.shape[1])


def compare(given, dtype):
    first, second = (gradients(run_lora(lora_linear), given) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name
    exact = {k: v.double() for k, v in given.items()}
    close(first, gradients(run_lora(reference), exact), dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", some([True, False], [True]))
def test_equals_the_reference(shape, bias):
    compare(lora_inputs(*shape, bias=bias), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    compare(lora_inputs((19,), (19,), 24, 40, 20, dtype), dtype)


def test_transposed_weight_and_strided_rows():
    given = lora_inputs((6, 7), (7, 1), 20, 24, 5) | {"scales": torch.rand(6, 1, 5)}
    exact = gradients(run_lora(reference), {k: v.double() for k, v in given.items()})
    given["weight"] = given["weight"].t().contiguous().t()
    given["x"] = given["x"].transpose(0, 1).contiguous().transpose(0, 1)
    close(gradients(run_lora(lora_linear), given), exact)


def test_nothing_is_written_outside_the_outputs():
    g = lora_inputs((21,), (21,), 17, 19, 7)
    low = torch.randn(21, 7)
    with guarded():
        launch.low_rank(g["x"], g["weight"], low, g["b"])
