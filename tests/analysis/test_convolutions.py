"""Options of convolutions, as their graphs have them."""

import pytest
import torch
from torch import nn

from moe_rewrite.analysis.convolutions import axes_of, is_transposed, options_of, per_axis
from moe_rewrite.frontend.capture import program_of
from moe_rewrite.ir.ops import op

CASES = {
    "line": (nn.Conv1d(4, 4, 3, 2, 1, 2), (2, 4, 9), ([2], [1], [2])),
    "map": (nn.Conv2d(4, 4, (3, 1), (1, 2)), (2, 4, 9, 7), ([1, 2], [0, 0], [1, 1])),
    "volume": (nn.Conv3d(4, 4, 3, padding="same"), (2, 4, 5, 6, 7), ([1] * 3, "same", [1] * 3)),
    "transposed line": (nn.ConvTranspose1d(4, 2, 3, 2, 1, 1), (2, 4, 9), ([2], [1], [1], [1])),
    "transposed volume": (
        nn.ConvTranspose3d(4, 2, 2, 2), (2, 4, 3, 4, 5), ([2] * 3, [0] * 3, [1] * 3, [0] * 3),
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", CASES)
def test_options_of_a_convolution(name):
    conv, shape, options = CASES[name]
    program = program_of(conv, torch.zeros(shape))
    (node,) = [n for n in program.graph.nodes if op(n).product == "filter"]
    assert options_of(node) == options and axes_of(node) == len(shape) - 2
    assert is_transposed(node) == ("transposed" in name)


def test_one_number_is_for_all_axes():
    assert (
        per_axis(3, 2) == [3, 3] and per_axis([2], 3) == [2, 2, 2] and per_axis((1, 5), 2) == [1, 5]
    )
