"""Feed-forward kernels against the float64 reference, forward and backward."""

import pytest
import torch
from kernel_inputs import KINDS, NAMES, close, ffn_inputs, gradients, run_ffn
from sentinels import guarded
from sweeps import some

from moe_rewrite.kernels import tile_sizes
from moe_rewrite.kernels.ffn import launch
from moe_rewrite.kernels.ffn.cpu_plan import Gradients
from moe_rewrite.kernels.ffn.op import ffn_dense, ffn_experts
from moe_rewrite.kernels.ffn.reference import ACTIVATIONS
from moe_rewrite.kernels.ffn.reference import ffn_experts as reference
from moe_rewrite.kernels.plan.op import sort_plan

pytestmark = pytest.mark.usefixtures("on_device")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of every kind at sizes that the interpreter does in no time."""
    small = tile_sizes.TileSizes(16, 16, 16, 4, 2)
    for kind in ("product", "activated", "gradient"):
        monkeypatch.setattr(tile_sizes, kind, lambda *_: small)


def compare(given, activation, dtype, E, op=ffn_experts):
    small = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
    small["gates"] = given["gates"].float()
    exact = {k: v.double() if v.is_floating_point() else v for k, v in small.items()}
    plan = None if op is ffn_dense else sort_plan(given["experts"], E)
    first, second = (gradients(run_ffn(op, activation, plan), small) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name
    close(first, gradients(run_ffn(reference, activation), exact), dtype)


@pytest.mark.parametrize(("shape", "spread", "kinds"), [
    # T, D, H, E, K
    ((13, 20, 36, 4, 2), "random", "gated"), ((1, 8, 3, 5, 5), "random", "biases"),
    ((33, 16, 32, 1, 1), "random", "plain"), ((21, 17, 18, 3, 1), "one", "plain biases"),
    ((20, 33, 5, 6, 2), "some", "biases"), ((0, 4, 6, 3, 2), "random", "gated"),
], ids=str)  # fmt: skip
def test_equals_the_reference(shape, spread, kinds):
    activation = "silu" if "gate" in KINDS[kinds] else "relu2"
    given = ffn_inputs(*shape, KINDS[kinds], seed=sum(shape), spread=spread)
    compare(given, activation, torch.float32, shape[3])


@pytest.mark.parametrize("activation", some(ACTIVATIONS, ["gelu", "relu2"]))
def test_activations(activation):
    compare(ffn_inputs(9, 7, 20, 2, 1, KINDS["plain"], seed=3), activation, torch.float32, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kinds", some(["biases", "plain"], ["biases"]))
def test_half_precision(kinds, dtype):
    compare(ffn_inputs(21, 24, 40, 3, 2, KINDS[kinds], seed=5), "gelu", dtype, 3)


def test_repeated_rows_and_dropped_pairs():
    given = ffn_inputs(19, 12, 20, 4, 3, KINDS["biases"], seed=7)
    given["x"][5:] = given["x"][0]
    given["experts"][::3, 1] = -1
    given["experts"][1::4, 2] = 4
    given["experts"][2] = 1  # one expert thrice
    compare(given, "silu", torch.float32, 4)


def test_every_expert_on_every_row():
    given = ffn_inputs(11, 9, 20, 3, 3, KINDS["biases"], seed=8)
    given["experts"] = torch.arange(3).expand(11, 3)
    compare(given, "silu", torch.float32, 3, op=ffn_dense)


def test_more_experts_than_a_program_finds_tiles_for():
    compare(ffn_inputs(4, 5, 6, 70, 2, KINDS["plain"], seed=9), "relu", torch.float32, 70)


def test_transposed_weights_lists_and_strided_rows():
    given = ffn_inputs(14, 12, 20, 3, 2, KINDS["biases"], seed=10)
    small = {k: v.float() if v.is_floating_point() else v for k, v in given.items()}
    plan = sort_plan(given["experts"], 3)
    expected = gradients(run_ffn(reference, "silu"), given)
    turned = {
        k: v.transpose(1, 2).contiguous().transpose(1, 2) if v.ndim == 3 else v
        for k, v in small.items()
    }
    turned["x"] = turned["x"].t().contiguous().t()
    apart = {k: list(v) if k in NAMES else v for k, v in small.items()}
    for form in (turned, apart):
        close(gradients(run_ffn(ffn_experts, "silu", plan), form), expected)


def test_nothing_is_written_outside_the_outputs():
    given = ffn_inputs(21, 17, 19, 3, 2, KINDS["biases"], seed=11, spread="some")
    small = {k: v.float() if v.is_floating_point() else v for k, v in given.items()}
    plan = sort_plan(given["experts"], 3)
    lists, gates = [[small[k]] for k in NAMES], small["gates"]
    with guarded():
        y, pre = launch.forward(small["x"], gates, *plan, lists, "silu", True)
        into = Gradients(*(torch.empty_like(w[0]) for w in lists))
        launch.backward(y, small["x"], gates, *plan, pre, lists, "silu", True, True, into)
