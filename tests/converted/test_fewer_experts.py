"""Two experts joined into one, and those removed that few rows go to."""

import copy

import pytest
import torch
from torch import nn

import moe_rewrite
from moe_rewrite import LoRAExperts, MoeRewriteError, TokenRouter

WIDTH, EXAMPLE = 8, torch.zeros(4, 8)


def task(number, count=4):
    draw = torch.Generator().manual_seed(number)
    centre = 3 * torch.randn(WIDTH, generator=draw)
    return [centre + torch.randn(5, WIDTH, generator=draw) for _ in range(count)]


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(3)]
    router = TokenRouter(fit="analytic", projection=32, top_k=1)
    moe = moe_rewrite.convert(
        nn.Sequential(*layers).eval(), split=1, router=router, experts=LoRAExperts(4),
        example_inputs=EXAMPLE, num_experts=4, verify=False,
    )  # fmt: skip
    with torch.no_grad():
        for site in adapters(moe):
            for b in site.b:
                b.normal_()
    moe.fit_router(None, task(99))
    for number in range(4):
        moe.fit_router(number, task(number))
        moe.rename(number, f"t{number}")
    return moe


def adapters(moe):
    return [site for site in moe.expert_sites() if site.as_adapter]


def delta(site, e):
    return (site.b[e] @ site.a[e]).detach().double()


@pytest.mark.parametrize("weight", [0.5, 0.2])
def test_the_joined_map_is_the_nearest_of_its_rank_to_the_mean(made, weight):
    moe = copy.deepcopy(made)
    means = [(1 - weight) * delta(s, 1) + weight * delta(s, 3) for s in adapters(moe)]
    others = [delta(s, 2) for s in adapters(moe)]
    lost = moe.join_experts("t1", "t3", weight)
    assert moe.names == ["t0", "t1", "t2"]
    for site, mean, other in zip(adapters(moe), means, others, strict=True):
        u, s, v = torch.linalg.svd(mean)
        nearest = (u[:, :4] * s[:4]) @ v[:4]
        torch.testing.assert_close(delta(site, 1), nearest, rtol=1e-4, atol=1e-5)
        error = (s[4:].square().sum() / s.square().sum()).sqrt()
        torch.testing.assert_close(lost[site.site.name], float(error), rtol=1e-5, atol=1e-6)
        assert torch.equal(delta(site, 2), other)
    want = copy.deepcopy(made)
    want.fit_router("t1", task(3))
    want.remove("t3")
    for ours, theirs in zip(moe.router.rows, want.router.rows, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    for number in (1, 3):
        assert (moe.route(torch.cat(task(number))).selected == 2).float().mean() > 0.9


def test_what_cannot_be_joined_is_refused_and_nothing_is_changed(made):
    moe = copy.deepcopy(made)
    moe.expand(1, name="new")
    before = {k: v.clone() for k, v in moe.state_dict().items()}
    for pair, words in ((("t1", "t1"), "itself"), (("t1", "new"), "not trained")):
        with pytest.raises(MoeRewriteError, match=words):
            moe.join_experts(*pair)
    with pytest.raises(MoeRewriteError, match="weight"):
        moe.join_experts("t1", "t2", 1.5)
    assert all(torch.equal(before[k], v) for k, v in moe.state_dict().items())
    trained = moe_rewrite.convert(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval(), split=1, router=TokenRouter(),
        num_experts=2, example_inputs=EXAMPLE, verify=False,
    )  # fmt: skip
    trained._experts.trained = [True, True]
    with pytest.raises(MoeRewriteError, match="fit='analytic'"):
        trained.join_experts(0, 1)


def test_experts_that_few_rows_go_to_are_removed(made):
    moe = copy.deepcopy(made)
    used = [*task(0), *task(2)]
    use = moe.expert_use(used)
    assert use["t0"] > 0.4 and use["t2"] > 0.4 and use["t1"] < 0.05 and use["t3"] < 0.05
    assert moe.prune(used, below=0.1) == {k: use[k] for k in ("t1", "t3")}
    assert moe.names == ["t0", "t2"]
    want = copy.deepcopy(made)
    want.remove("t3")
    want.remove("t1")
    x = torch.cat(used)
    with torch.no_grad():
        assert torch.equal(moe(x), want(x))
    with pytest.raises(MoeRewriteError, match="one has to stay"):
        moe.prune(used, below=1.0)
    with pytest.raises(MoeRewriteError, match="no rows"):
        moe.prune([], below=0.1)
