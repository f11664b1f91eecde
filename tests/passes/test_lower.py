"""Which form the routed work takes, that all give the same, and what the report says of it."""

import networks
import pytest
import torch
from kernel_inputs import close, gradients
from reference import randomize

import moe_rewrite
from moe_rewrite import FFNExperts, LoRAExperts, TokenRouter
from moe_rewrite.errors import ConfigError
from moe_rewrite.kernels import cost_model
from moe_rewrite.kernels.cost_model import CPU, Machine
from moe_rewrite.kernels.lora import grouped
from moe_rewrite.kernels.lora.grouped import lora_grouped
from moe_rewrite.kernels.lora.reference import lora_linear as reference
from moe_rewrite.kernels.plan.op import sort_plan

SHAPES = [  # leading dimensions, D, O, experts, rank, k, experts with rows
    ((13,), 5, 7, 4, 3, 2, 4), ((2, 6), 8, 3, 5, 1, 3, 5), ((9,), 6, 6, 3, 4, 1, 1),
    ((0,), 4, 3, 2, 2, 1, 2), ((1,), 16, 24, 8, 2, 2, 8), ((4, 2, 3), 3, 4, 6, 2, 2, 3),
]  # fmt: skip


def inputs(lead, D, O, E, r, k, busy, seed=0):  # noqa: E741
    """fp64 inputs by name; a third of the pairs goes to no expert."""
    torch.manual_seed(seed)
    T = torch.Size(lead).numel()
    experts = torch.rand(T, busy).argsort(-1)[:, :k]
    experts = experts.masked_fill(torch.rand(experts.shape) < 0.3, -1)
    given = {"x": torch.randn(*lead, D), "weight": torch.randn(O, D), "bias": torch.randn(O)}
    given |= {"gates": torch.rand(experts.shape), "a": torch.randn(E * r, D)}
    return {k: v.double() for k, v in (given | {"b": torch.randn(O, E * r)}).items()}, experts


def by_plan(experts, E, r):
    plan = sort_plan(experts, E)
    return lambda g: lora_grouped(
        g["x"], g["weight"], g["bias"], g["gates"], plan, g["a"], g["b"], r
    )


def by_scales(experts, E, r):
    """The definition: every expert on every row, with a gate of zero where it has none."""

    def run(g):
        every = g["gates"].new_zeros(len(experts), E + 1)
        every = every.scatter(1, experts.masked_fill(experts < 0, E), g["gates"])[:, :E]
        scales = every.repeat_interleave(r, 1).view(*g["x"].shape[:-1], E * r)
        return reference(g["x"], g["weight"], g["bias"], scales, g["a"], g["b"])

    return run


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_grouped_equals_the_definition(shape, dtype):
    given, experts = inputs(*shape)
    E, r = shape[3:5]
    small = {k: v.to(dtype) for k, v in given.items()}
    exact = {k: v.double() for k, v in small.items()}
    found = gradients(by_plan(experts, E, r), small)
    close(found, gradients(by_scales(experts, E, r), exact), dtype)
    again = gradients(by_plan(experts, E, r), small)
    assert all(torch.equal(found[k], again[k]) for k in found)


def test_of_lists_only_the_trained_part_gets_a_gradient():
    given, experts = inputs(*SHAPES[0])
    parts = {"a": given["a"].split([6, 3, 3]), "b": given["b"].split([6, 3, 3], 1)}
    leaves = {
        name: [t.clone().requires_grad_(i == 2) for i, t in enumerate(of)]
        for name, of in parts.items()
    }
    by_plan(experts, 4, 3)(given | leaves).square().sum().backward()
    whole = {k: v.clone().requires_grad_() for k, v in given.items()}
    by_scales(experts, 4, 3)(whole).square().sum().backward()
    assert leaves["a"][0].grad is None and leaves["b"][1].grad is None
    torch.testing.assert_close(leaves["a"][2].grad, whole["a"].grad[9:])
    torch.testing.assert_close(leaves["b"][2].grad, whole["b"].grad[:, 9:])


def test_grouped_is_an_op_that_compiles():
    given, experts = inputs(*SHAPES[0])
    plan = sort_plan(experts, 4)
    leaves = {k: v.requires_grad_() for k, v in given.items()}
    args = (*(leaves[k] for k in ("x", "weight", "bias", "gates")), plan.order, plan.offsets)
    torch.library.opcheck(grouped._grouped, (*args, [leaves["a"]], [leaves["b"]], 3, True))
    compiled = torch.compile(by_plan(experts, 4, 3), backend="aot_eager", fullgraph=True)
    close(gradients(compiled, given), gradients(by_plan(experts, 4, 3), given), torch.float64)


def test_a_plan_of_other_experts_is_refused():
    given, experts = inputs(*SHAPES[0])
    with pytest.raises(ValueError, match="among 5 experts: expected 26 among 4"):
        lora_grouped(*(given[k] for k in ("x", "weight", "bias", "gates")), sort_plan(experts, 5),
                     given["a"], given["b"], 3)  # fmt: skip


@pytest.mark.parametrize("experts", [FFNExperts(), LoRAExperts(rank=4)], ids=["ffn", "lora"])
def test_every_form_gives_the_same(experts, monkeypatch):
    """Outputs and gradients of a model whose router keeps two of five, by every backend."""
    model = networks.Network(["Mlp", "Mlp", "Attention", "Bare"]).eval()
    x, found, taken = model.input(2, 11, seed=3), {}, []
    real = grouped._forward
    monkeypatch.setattr(grouped, "_forward", lambda *a: (taken.append(a), real(*a))[1])
    for backend in ("reference", "dense", "grouped", "auto"):
        taken.clear()
        moe = moe_rewrite.convert(
            model, split=1, router=TokenRouter(top_k=2, base=False, init=1.0), experts=experts,
            num_experts=5, backend=backend, verify=backend == "auto",
            example_inputs=model.input(2, 9),
        )  # fmt: skip
        randomize(moe)
        y = moe(x)
        y.square().sum().backward()
        grads = {n: p.grad for n, p in moe.named_parameters() if p.grad is not None}
        found[backend] = {"y": y.detach(), "row by row": _by_rows(moe, x)} | grads
        wanted = backend == "grouped" and isinstance(experts, LoRAExperts)
        assert bool(taken) == wanted, "22 rows are few: the stacked form is the cheaper one"
        assert bool(moe.report.lowered) == (backend != "reference")
    reference = found.pop("reference")
    assert len(reference) > 10
    for tensors in found.values():
        close(tensors, reference)


def _by_rows(moe, x):
    with torch.no_grad():
        return torch.cat([moe(row[None]) for row in x])


@pytest.mark.parametrize("experts", [FFNExperts(), LoRAExperts(rank=4)], ids=["ffn", "lora"])
def test_forms_train_under_autocast(experts):
    """Every form gives what the reference gives there, within bf16's rounding."""
    model = networks.Network(["Mlp", "Mlp"]).eval()
    x, found = model.input(2, 11, seed=3), {}
    for backend in ("reference", "dense", "grouped"):
        moe = moe_rewrite.convert(
            model, split=1, router=TokenRouter(top_k=2, base=False, init=1.0), experts=experts,
            num_experts=5, backend=backend, verify=False, example_inputs=model.input(2, 9),
        )  # fmt: skip
        randomize(moe)
        with torch.autocast("cpu", torch.bfloat16):
            y = moe(x)
            y.float().square().sum().backward()
        grads = {n: p.grad for n, p in moe.named_parameters() if p.grad is not None}
        found[backend] = {"y": y.detach()} | grads
    reference = found.pop("reference")
    assert len(reference) > 5
    for tensors in found.values():
        close(tensors, reference, torch.bfloat16)


def test_the_report_says_what_is_chosen_and_why():
    model = networks.Network(["Mlp", "Mlp"])
    report = moe_rewrite.convert(
        model, split=1, router=TokenRouter(top_k=2), experts=LoRAExperts(rank=64), num_experts=64,
        example_inputs=model.input(2, 9), dry_run=True,
    )  # fmt: skip
    how = dict(report.lowered)["layers.1.up"]
    assert "dense for 1 row (0." in how and "grouped for 4096 rows (0." in how
    assert how.split(" (")[0] in " ".join(str(report).replace("│", " ").split())


def test_an_unknown_backend_is_refused():
    with pytest.raises(ConfigError, match="backend='cuda': expected 'auto' or"):
        moe_rewrite.convert(torch.nn.Linear(2, 2), backend="cuda")


@pytest.mark.parametrize(("size", "form"), [
    ((4096, 512, 512, 4, 8, 2), "dense"), ((4096, 512, 512, 64, 16, 2), "grouped"),
    ((1, 512, 512, 8, 8, 2), "dense"),
])  # fmt: skip
def test_the_cheaper_form_of_lora_experts(size, form):
    assert cost_model.best(cost_model.lora(CPU, *size)) == form


def test_costs_follow_the_machine():
    """Where calls cost nothing and products all, fewer products win; where calls are all, fewer."""
    size = (512, 256, 256, 16, 8, 1)
    products, calls = Machine(1e9, 1e30, 0.0), Machine(1e30, 1e30, 1.0)
    times = cost_model.lora(products, *size)
    assert times["grouped"] == pytest.approx(times["dense"] / 16, rel=1e-6)
    assert cost_model.best(cost_model.lora(calls, *size)) == "dense"
    times = cost_model.ffn(products, 512, 256, 1024, 8, 2, 3)
    assert times["grouped"] == pytest.approx(times["dense"] / 4, rel=1e-6)
