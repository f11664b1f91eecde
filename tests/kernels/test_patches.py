"""The patch ops on the CPU: as ops against the reference, under opcheck and torch.compile."""

import pytest
import torch
from kernel_inputs import close, gradients
from patch_inputs import patch_inputs

from moe_rewrite.kernels.patches import op, reference

SHAPES = [
    (2, 3, 2, 2, (6, 5), 4, (3, 4)),
    (1, 2, 1, 3, (7, 8), 3, (5, 4)),
    (0, 2, 2, 1, (3, 3), 2, (2, 2)),
]


def forms(shape):
    """(given, the op, the reference) of gathering and of scattering."""
    given, (H, W), patch = patch_inputs(*shape), shape[4], shape[6]
    out = {k: given[k] for k in ("x", "picks", "positions")}
    back = {k: given[k] for k in ("patches", "gates", "picks", "positions")}
    yield (
        out,
        lambda g: op._gather(g["x"].flatten(2), g["picks"], g["positions"]),
        lambda g: reference.gather_patches(g["x"], g["picks"], g["positions"], patch).flatten(3),
    )
    yield (
        back,
        lambda g: op._scatter(
            g["patches"].flatten(3), g["gates"], g["picks"], g["positions"], H * W
        ),
        lambda g: reference.scatter_patches(
            list(g["patches"]), g["gates"], g["picks"], g["positions"], (H, W), False
        ).flatten(2),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ops_equal_the_reference(shape):
    for given, run, plain in forms(shape):
        expected = gradients(plain, given)
        close(gradients(run, given), expected, torch.float64)
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
        close(gradients(compiled, given), expected, torch.float64)


def test_opcheck():
    given = patch_inputs(*SHAPES[0])
    x = given["x"].flatten(2).requires_grad_()
    patches, gates = given["patches"].flatten(3).requires_grad_(), given["gates"].requires_grad_()
    torch.library.opcheck(op._gather, (x, given["picks"], given["positions"]))
    for some in (gates, None):
        args = (patches if some is not None else patches.detach(), some, given["picks"])
        torch.library.opcheck(op._scatter, (*args, given["positions"], 30))


def test_the_public_functions_are_the_reference_where_there_is_no_kernel():
    given = patch_inputs(*SHAPES[0])
    g = [given[k] for k in ("x", "picks", "positions")]
    assert torch.equal(op.gather_patches(*g, (3, 4)), reference.gather_patches(*g, (3, 4)))
