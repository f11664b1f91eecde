"""Feed-forward experts on the CPU: against the float64 reference, forward and backward."""

import pytest
import torch
from kernel_inputs import close, ffn_inputs, gradients

from moe_rewrite.kernels.cpu_threads import spread
from moe_rewrite.kernels.ffn import cpu, cpu_padded, cpu_plan
from moe_rewrite.kernels.ffn.op import _ffn, ffn_dense, ffn_experts
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


@pytest.fixture(params=[24, cpu_plan.FEW], ids=["many batches", "few batches"])
def batches(request, monkeypatch):
    monkeypatch.setattr(cpu_plan, "FEW", request.param)


@pytest.mark.usefixtures("batches")
@pytest.mark.parametrize("kinds", [GATED, ALL, PLAIN], ids=["gated", "biases", "plain"])
@pytest.mark.parametrize("shape", [
    # T, D, H, E, K
    (13, 5, 7, 4, 2), (1, 8, 3, 5, 5), (33, 16, 24, 1, 1), (0, 4, 6, 3, 2), (64, 8, 8, 64, 3), (7, 4, 0, 3, 2),
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


def few(dtype=torch.float32, stacked=True):
    """Arguments of the op itself: 5 rows, 3 experts, 2 a row; a pair is dropped."""
    given = ffn_inputs(5, 4, 6, 3, 2, ALL, seed=1)
    given["experts"][3, 1] = -1
    small = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
    leaves = {k: v.requires_grad_() if v.is_floating_point() else v for k, v in small.items()}
    lists = [[leaves[k]] if stacked else list(leaves[k].detach().unbind(0)) for k in ALL]
    if not stacked:
        lists = [[w.requires_grad_(e != 1) for e, w in enumerate(kind)] for kind in lists]
    plan = sort_plan(given["experts"], 3)
    return leaves["x"], leaves["gates"], *plan, *lists, "gelu", False, False, True


@pytest.mark.parametrize("stacked", [True, False])
def test_opcheck(stacked):
    torch.library.opcheck(_ffn, few(stacked=stacked))


def joined(weights):
    """The gate's rows and up's in one stack, as transformers stores them."""
    pairs = {"up_EHD": "gate_EHD", "up_bias_EH": "gate_bias_EH"}
    both = {k: torch.cat([weights[g], weights[k]], 1) for k, g in pairs.items() if k in weights}
    return {k: v for k, v in weights.items() if k not in pairs.values()} | both | {"joined": True}


@pytest.mark.usefixtures("batches")
@pytest.mark.parametrize("kinds", [GATED, ALL], ids=["gated", "biases"])
@pytest.mark.parametrize("T", [0, 1, 9, 70])
def test_a_gate_and_up_in_one_stack(kinds, T):
    given = ffn_inputs(T, 6, 10, 4, 2, kinds, seed=T)

    def call(g, change):
        plan = sort_plan(g["experts"], 4)
        return ffn_experts(g["x"], g["gates"], g["experts"], plan, **change(run(g, "silu")))

    close(gradients(lambda g: call(g, joined), given), gradients(lambda g: call(g, dict), given))


def test_opcheck_of_a_gate_and_up_in_one_stack():
    x, gates, order, offsets, inverse, up, down, gate, up_bias, gate_bias, down_bias, *_ = few()
    up, up_bias = (
        [torch.cat([a[0], b[0]], 1).detach().requires_grad_()]
        for a, b in ((gate, up), (gate_bias, up_bias))
    )
    plan = order, offsets, inverse
    weights = up, down, [], up_bias, [], down_bias
    torch.library.opcheck(_ffn, (x, gates, *plan, *weights, "silu", True, False, True))


def test_one_stack_of_odd_rows_is_refused():
    given = ffn_inputs(3, 4, 5, 3, 2, ["up", "down"], seed=0)
    with pytest.raises(ValueError, match="joined: expected up as one stack"):
        ffn_experts(
            given["x"], given["gates"], given["experts"], None, **run(given, "silu"), joined=True
        )


def test_a_compiled_step_gives_the_same():
    given = ffn_inputs(14, 4, 6, 3, 2, ALL, seed=2)
    given = {k: v.float() if v.is_floating_point() else v for k, v in given.items()}

    def step(g):
        plan = sort_plan(g["experts"], 3)
        return ffn_experts(g["x"], g["gates"], g["experts"], plan, **run(g, "silu"))

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for name, got in gradients(compiled, given).items():
        torch.testing.assert_close(got, gradients(step, given)[name], msg=name)


@pytest.mark.usefixtures("batches")
@pytest.mark.parametrize("spread", ["random", "one", "some"])
@pytest.mark.parametrize("T", [12, 90, 400])
def test_few_and_many_rows_of_stacks_and_dropped_pairs(T, spread):
    """Equal groups, and a slice per expert: the same as the reference, twice the same bits."""
    given = ffn_inputs(T, 6, 10, 4, 2, ALL, seed=T, spread=spread)
    given["experts"][::5, 0] = -1
    small = {k: v.float() if v.is_floating_point() else v for k, v in given.items()}
    plan = sort_plan(given["experts"], 4)

    def step(g):
        return ffn_experts(g["x"], g["gates"], g["experts"], plan, **run(g, "gelu_tanh"))

    first, second = gradients(step, small), gradients(step, small)
    assert all(torch.equal(first[name], second[name]) for name in first)
    expected = gradients(
        lambda g: reference(g["x"], g["gates"], g["experts"], **run(g, "gelu_tanh")), given
    )
    close(first, expected)
    with torch.no_grad():
        torch.testing.assert_close(step(small), first["y"])


@pytest.fixture(params=[2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("form", ["stacked", "apart", "dense"])
@pytest.mark.parametrize("kinds", [GATED, ALL, PLAIN], ids=["gated", "biases", "plain"])
def test_shares_of_several_cores(kinds, form, threads, monkeypatch):
    """Dropped pairs and an expert without a row: the same as the reference and, but for rounding,
    as one share; twice the same bits."""
    for name, value in {"SPREAD": 1, "FEW": 1000, "UNEVEN": 1}.items():
        monkeypatch.setattr(cpu_plan, name, value)
    given = ffn_inputs(600, 6, 10, 7, 3, kinds, seed=threads)
    given["experts"][::7, 0] = -1
    given["experts"][given["experts"] == 4] = 6
    plan = sort_plan(given["experts"], 7)
    if form == "dense":
        given["gates"] = torch.rand(600, 7).double()
        given["experts"] = torch.arange(7).expand(600, 7)
    small = {k: v.float() if v.is_floating_point() else v for k, v in given.items()}
    if form == "apart":
        small = {k: list(v) if k in kinds else v for k, v in small.items()}

    def step(g):
        if form == "dense":
            return ffn_dense(g["x"], g["gates"], **run(g, "relu2"))
        return ffn_experts(g["x"], g["gates"], g["experts"], plan, **run(g, "relu2"))

    used = []
    monkeypatch.setattr(cpu, "spread", lambda work, n: used.append(n) or spread(work, n))
    first, second = gradients(step, small), gradients(step, small)
    assert set(used) == {threads}
    assert all(torch.equal(first[name], second[name]) for name in first)
    close(
        first,
        gradients(lambda g: reference(g["x"], g["gates"], g["experts"], **run(g, "relu2")), given),
    )
    with torch.inference_mode():
        torch.testing.assert_close(step(small), first["y"])
    monkeypatch.setattr(cpu_plan, "SPREAD", 1 << 60)
    close(gradients(step, small), {k: v.double() for k, v in first.items()})
    assert used[-1] == 1


@pytest.mark.parametrize("joins", [False, True])
@pytest.mark.parametrize("kinds", [GATED, ALL, PLAIN], ids=["gated", "biases", "plain"])
def test_ranges_of_experts_with_few_rows(kinds, joins, threads, monkeypatch):
    """A range without rows, experts without, dropped pairs; the range's rows differ from the next's."""
    monkeypatch.setattr(cpu_plan, "UNEVEN", 1)
    monkeypatch.setattr(cpu_padded, "TOGETHER", 3)
    given = ffn_inputs(90, 6, 10, 11, 2, kinds, seed=3)
    for idle in (3, 4, 5, 8):
        given["experts"][given["experts"] == idle] = -1
    plan = sort_plan(given["experts"], 11)
    small = {k: v.float() if v.is_floating_point() else v for k, v in given.items()}
    activation = "silu" if "gate" in kinds else "relu2"

    def step(g):
        weights = run(g, activation)
        weights = joined(weights) if joins and "gate" in kinds else weights
        return ffn_experts(g["x"], g["gates"], g["experts"], plan, **weights)

    used = []
    monkeypatch.setattr(cpu_padded, "spread", lambda work, n: used.append(n) or spread(work, n))
    whole = gradients(step, small)
    assert used == [1, 1]
    for module in (cpu_plan, cpu_padded):
        monkeypatch.setattr(module, "SPREAD", 1)
    first, second = gradients(step, small), gradients(step, small)
    assert used[2:] == [threads] * 4
    assert all(torch.equal(first[name], second[name]) for name in first)
    close(
        first,
        gradients(
            lambda g: reference(g["x"], g["gates"], g["experts"], **run(g, activation)), given
        ),
    )
    close(whole, {k: v.double() for k, v in first.items()})


@pytest.mark.parametrize("sizes, shares", [
    ([100, 100, 100, 100], [[0, 2], [1, 3]]),
    ([300, 100, 100, 100], [[0], [1, 2, 3]]),
    ([301, 100, 50, 50], [[0, 1, 2, 3]]),  # uneven
    ([10, 10], [[0, 1]]),  # few
    ([], [[]]),
])  # fmt: skip
def test_shares_are_even_and_worth_it(sizes, shares, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert cpu_plan.divided(sizes, 1 << 18) == shares


def test_a_row_that_takes_an_expert_twice():
    given = ffn_inputs(1, 6, 10, 4, 3, ALL, seed=0)
    given["experts"][:] = torch.tensor([2, 0, 2])
    small = {k: v.float() if v.is_floating_point() else v for k, v in given.items()}
    close(
        gradients(lambda g: ffn_experts(g["x"], g["gates"], g["experts"], None, **run(g, "relu")), small),
        gradients(lambda g: reference(g["x"], g["gates"], g["experts"], **run(g, "relu")), given),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kinds", [GATED, ALL, PLAIN], ids=["gated", "biases", "plain"])
@pytest.mark.parametrize("chosen", [[2, 0, 1], [3, 3, 0], [1, -1, 9], [-1, 5, 4]])
def test_a_decoded_row(dtype, kinds, chosen):
    """One row without a backward pass is not sorted: stacks, lists, gate and up in one stack; a
    repeated expert, and indices that are no expert's."""
    given = ffn_inputs(1, 8, 6, 4, 3, kinds, seed=2)
    given["experts"] = torch.tensor([chosen])
    activation = "silu" if "gate" in kinds else "relu2"
    expected = reference(given["x"], given["gates"], given["experts"], **run(given, activation))
    small = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
    x, gates, experts = (small[k][:, None] for k in ("x", "gates", "experts"))  # (1, 1, ...)
    weights = run(small, activation)
    forms = [weights, {k: list(w) if k != "activation" else w for k, w in weights.items()}]
    if "gate" in kinds:
        forms.append(joined(weights))
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5}.get(dtype, 5e-2)
    for form in forms:
        with torch.no_grad():
            got = ffn_experts(x, gates, experts, None, **form)
            planned = ffn_experts(x, gates, experts, sort_plan(experts, 4), **form)
        assert got.shape == x.shape and got.dtype == dtype and torch.equal(got, planned)
        torch.testing.assert_close(got[0].double(), expected, rtol=tolerance, atol=tolerance)
