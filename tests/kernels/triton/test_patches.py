"""Patch kernels through their ops: against the float64 reference, forward and backward."""

import pytest
import torch
from kernel_inputs import close, gradients
from patch_inputs import patch_inputs
from sentinels import guarded

from moe_rewrite.kernels.patches import launch, op, reference

pytestmark = pytest.mark.usefixtures("on_device")

SHAPES = [
    # B, C, E, L, (H, W), patches, (h, w)
    (2, 3, 2, 2, (6, 5), 4, (3, 4)), (1, 1, 1, 1, (1, 1), 1, (1, 1)),
    (2, 17, 3, 2, (4, 4), 3, (2, 2)), (0, 2, 2, 1, (3, 3), 2, (2, 2)),
    (1, 2, 1, 2, (18, 18), 2, (18, 17)),
]  # fmt: skip


def gather(module, size):
    return lambda g: module.gather_patches(g["x"], g["picks"], g["positions"], size)


def scatter(module, size):
    def run(g):
        return module.scatter_patches(
            list(g["patches"]), g["gates"], g["picks"], g["positions"], size, False
        )

    return run


def compare(run, given, size, dtype):
    small = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
    exact = {k: v.double() if v.is_floating_point() else v for k, v in small.items()}
    first, second = (gradients(run(op, size), small) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name
    close(first, gradients(run(reference, size), exact), dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.sweep), torch.float16],
    ids=str,
)
def test_equal_the_reference(shape, dtype):
    given = patch_inputs(*shape)
    out = {k: given[k] for k in ("x", "picks", "positions")}
    back = {k: given[k] for k in ("patches", "gates", "picks", "positions")}
    compare(gather, out, shape[6], dtype)
    compare(scatter, back, shape[4], dtype)


def test_nothing_is_written_outside_the_outputs():
    given = {
        k: v.float() if v.is_floating_point() else v
        for k, v in patch_inputs(2, 3, 2, 2, (5, 7), 4, (3, 3)).items()
    }
    x, patches = given["x"].flatten(2), given["patches"].flatten(3)
    gates, picks, positions = (given[k] for k in ("gates", "picks", "positions"))
    with guarded():
        launch.gather(x, picks, positions, gates)
        launch.scatter(patches, gates, picks, positions, 35)
        launch.gates_gradient(x, patches, picks, positions)
