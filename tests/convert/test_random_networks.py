"""Random networks convert and stay equal, or are refused with a reason: never silently wrong."""

import networks
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from reference import copied, hooked, randomize, site_names
from torch.utils import _pytree as pytree

import moe_rewrite
from moe_rewrite import LoRAExperts, MoeRewriteError, TokenRouter

SOME = settings(
    max_examples=25, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.generate),
)  # fmt: skip
layers = st.lists(
    st.one_of(st.sampled_from(sorted(networks.KINDS)), st.integers(0, 3)), min_size=2, max_size=5
)


def same(a, b, atol=1e-5):
    for x, y in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=atol)


@SOME
@given(
    layers=layers, tokens=st.booleans(), head=st.sampled_from(["each", "pooled"]),
    split=st.integers(-3, 3), granularity=st.sampled_from(["token", "prefix", "sequence"]),
    batch=st.integers(1, 4), length=st.integers(1, 12), seed=st.integers(0, 99),
)  # fmt: skip
def test_random_networks_stay_equal_or_are_refused(
    layers, tokens, head, split, granularity, batch, length, seed
):
    model = networks.Network(layers, tokens, seed, head).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        moe = moe_rewrite.convert(
            model, split=split, router=TokenRouter(granularity=granularity),
            experts=LoRAExperts(rank=2), example_inputs=model.input(2, 6),
        )  # fmt: skip
    except MoeRewriteError as refused:
        assert len(str(refused)) > 20
        return
    x = model.input(batch, length, seed)
    with torch.no_grad():
        same(moe(x), model(x))
        moe.expand(2)
        same(moe(x), model(x))
    moe.train()  # shallow blocks stay in eval mode; deep ones use dropout as the original does
    try:
        torch.manual_seed(1)
        ours = moe(x)
    except MoeRewriteError as refused:
        assert len(str(refused)) > 20
        return
    leaf = next(t for t in pytree.tree_leaves(ours) if t.requires_grad)
    leaf.sum().backward()
    assert all(p.grad is None for p in moe.shallow.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@SOME
@given(
    names=st.lists(
        st.sampled_from(["Mlp", "Attention", "Bare", "Branches", "Swapped", "InPlace"]),
        min_size=2, max_size=4,
    ),
    tokens=st.booleans(), granularity=st.sampled_from(["token", "sequence"]),
    batch=st.integers(1, 4), length=st.integers(2, 12), seed=st.integers(0, 99),
)  # fmt: skip
def test_experts_of_random_networks_do_what_hooks_do(
    names, tokens, granularity, batch, length, seed
):
    """Sites of every form; the reference finds them by the weight itself."""
    model = networks.Network(["Mlp", *names], tokens, seed).eval()
    try:
        moe = moe_rewrite.convert(
            model, split=1, router=TokenRouter(granularity=granularity), num_experts=2,
            experts=LoRAExperts(rank=2, sites="all+head"), example_inputs=model.input(2, 6),
        )  # fmt: skip
    except MoeRewriteError as refused:
        assert "look ahead" in str(refused) and granularity == "sequence"
        return
    randomize(moe, seed)
    state = copied(moe)
    swapped = {f"layers.{i}.first" for i, n in enumerate(["Mlp", *names]) if n == "Swapped"}
    if swapped & site_names(state):  # rows length first, which the reference does not know
        return
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {n for n in linears if n.startswith("layers.1")} <= site_names(state)
    x = model.input(batch, length, seed)
    with torch.no_grad():
        with hooked(model, "layers.0", state, 8.0, granularity, functional=True):
            want = model(x)
        same(moe(x), want, atol=1e-4)


@SOME
@given(
    batch=st.integers(1, 3), length=st.integers(2, 9), padding=st.integers(0, 8),
    cut=st.integers(1, 8), top_k=st.sampled_from([None, 1, 2]), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_prefix_router_looks_back_only_and_passes_over_padding(
    batch, length, padding, cut, top_k, seed
):
    from moe_rewrite.routing.token_gate import TokenGate

    torch.manual_seed(seed)
    router = TokenGate(TokenRouter(granularity="prefix", top_k=top_k), 4, torch.device("cpu"))
    router.add(3, active=True)
    with torch.no_grad():
        for row in router.rows:
            row.normal_()
    x, mask = torch.randn(batch, length, 4), torch.ones(batch, length)
    plan, _ = router(x, mask, None)
    torch.testing.assert_close(plan.gates.sum(-1), torch.ones(batch, length))
    assert top_k is None or int((plan.gates > 0).sum(-1).max()) <= top_k

    cut = min(cut, length - 1)  # in two parts, with the state in between
    first, state = router(x[:, :cut], mask[:, :cut], None)
    second, _ = router(x[:, cut:], mask, state)
    joined = torch.cat([first.gates, second.gates], 1)
    torch.testing.assert_close(joined, plan.gates, rtol=1e-4, atol=1e-5)

    padded = torch.cat([torch.full((batch, padding, 4), 1e30), x], 1)  # whatever padding holds
    mask = torch.cat([torch.zeros(batch, padding), mask], 1)
    shifted, _ = router(padded, mask, None)
    torch.testing.assert_close(shifted.gates[:, padding:], plan.gates, rtol=1e-4, atol=1e-5)
