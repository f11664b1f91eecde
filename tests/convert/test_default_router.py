"""The router that nobody asked for, and what it does for who trains once."""

import pytest
import torch
from networks import Residual

import moe_rewrite
from moe_rewrite import FFNExperts, TokenRouter
from moe_rewrite.passes.recipe import make_recipe

X = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(1))


def converted(**options):
    return moe_rewrite.convert(Residual().eval(), split=1, example_inputs=X, **options)


@pytest.mark.parametrize(
    ("options", "fit"),
    [
        ({}, "analytic"), ({"num_experts": 2}, "gradient"), ({"freeze": False}, "gradient"),
        ({"experts": FFNExperts()}, "gradient"), ({"mode": "upcycle"}, "gradient"),
    ],
)  # fmt: skip
def test_it_is_solved_in_closed_form_where_that_can_be(options, fit):
    assert make_recipe(**options).default_fit == fit


def test_a_router_that_is_passed_or_saved_is_taken_as_it_is(tmp_path):
    moe = converted(router=TokenRouter(granularity="prefix"))
    moe.save_pretrained(tmp_path)
    again = moe_rewrite.load(tmp_path, moe.to_dense(), X)
    assert moe.recipe.router.fit == again.recipe.router.fit == "gradient"


def test_who_trains_once_gets_what_was_trained_with_a_warning():
    moe = converted().train()
    assert moe.recipe.router.fit == "analytic"
    optimizer = torch.optim.Adam(moe.trainable_parameters(), lr=0.01)
    losses = []
    for _ in range(20):
        loss = (moe(X) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with pytest.warns(UserWarning, match="call moe.remember"):
        moe.eval()
    with torch.no_grad():
        ours = moe(X)
        assert (ours - 1).square().mean() < losses[-1] < losses[0]
        with moe.use_expert(0):
            torch.testing.assert_close(ours, moe(X), rtol=0, atol=1e-3)
        assert (moe.route(X).gates[..., 1] > 0.99).all()  # of the first positions, too
        before = X + torch.linspace(-3, 3, 8)
        moe.remember([before])
        assert (moe.route(before).gates[:, -1, 0] > 0.99).all()
        assert (moe.route(X).gates[:, -1, 1] > 0.99).all()
