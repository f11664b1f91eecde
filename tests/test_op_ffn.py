"""Feed-forward experts on the CPU: against the float64 reference, forward and backward."""

import pytest
from kernel_inputs import close, ffn_inputs, gradients

from moe_rewrite.kernels.ffn.op import ffn_experts
from moe_rewrite.kernels.ffn.reference import ffn_experts as reference
from moe_rewrite.kernels.plan.op import sort_plan

GATED = ["up", "down", "gate"]
ALL = ["up", "down", "gate", "up_bias", "gate_bias", "down_bias"]
PLAIN = ["up", "down", "up_bias", "down_bias"]


def run(given, activation):
    weights = {k: v for k, v in given.items() if k not in ("x", "gates", "experts")}
    names = {"up": "up_EHD", "down": "down_EDH", "gate": "gate_EHD", "up_bias": "up_bias_EH"}
    names |= {"gate_bias": "gate_bias_EH", "down_bias": "down_bias_ED"}
    return {names[k]: v for k, v in weights.items()} | {"activation": activation}


@pytest.mark.parametrize("kinds", [GATED, ALL, PLAIN], ids=["gated", "biases", "plain"])
@pytest.mark.parametrize("shape", [
    # T, D, H, E, K
    (13, 5, 7, 4, 2), (1, 8, 3, 5, 5), (33, 16, 24, 1, 1), (0, 4, 6, 3, 2), (64, 8, 8, 64, 3),
])  # fmt: skip
def test_equals_the_reference(kinds, shape):
    activation = "silu" if "gate" in kinds else "relu2"
    given = ffn_inputs(*shape, kinds, seed=sum(shape))
    expected = gradients(
        lambda g: reference(g["x"], g["gates"], g["experts"], **run(g, activation)), given
    )
    plan = sort_plan(given["experts"], shape[3])
    small = {k: v.float() if v.is_floating_point() else v for k, v in given.items()}
    got = gradients(
        lambda g: ffn_experts(g["x"], g["gates"], g["experts"], plan, **run(g, activation)), small
    )
    close(got, expected)
    apart = {k: list(v) if k in kinds else v for k, v in small.items()}
    close(
        gradients(
            lambda g: ffn_experts(g["x"], g["gates"], g["experts"], plan, **run(g, activation)),
            apart,
        ),
        expected,
    )
