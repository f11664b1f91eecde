"""torch.inference_mode() around conversion, calls and growth: training works afterwards."""

import copy

import networks
import pytest
import torch
from reference import randomize

import moe_rewrite
from moe_rewrite import TokenRouter
from moe_rewrite.errors import InputError

ROUTERS = {
    "gradient": TokenRouter(granularity="sequence", base=True),
    "analytic": TokenRouter(granularity="sequence", fit="analytic"),
}


def network():
    return networks.Network(["Mlp", "Attention", "Mlp"]).eval()


def trained(moe, x):
    """The loss of three steps in training mode, and one in evaluation mode."""
    parameters = moe.trainable_parameters()
    optimizer, losses = torch.optim.SGD(parameters, lr=0.05), []
    for mode in (True, True, True, False):
        moe.train(mode)
        loss = moe(x).square().mean()
        loss.backward()
        assert any(p.grad.any() for p in parameters if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.filterwarnings("ignore:the router knows no rows of what the model did before")
@pytest.mark.parametrize("router", ROUTERS)
def test_what_is_converted_grown_and_run_in_it_trains_the_same(router):
    model = network()
    x, y = model.input(3, 5), model.input(2, 7)

    def grown():
        moe = moe_rewrite.convert(
            model, split=1, example_inputs=model.input(2, 6), router=ROUTERS[router]
        )
        randomize(moe)
        moe.eval()
        moe(y)
        if router == "analytic":
            moe.remember([y])
        moe.expand()
        moe.activate(1)
        moe(x)
        return moe

    torch.manual_seed(0)
    want = trained(grown(), x)
    torch.manual_seed(0)
    with torch.inference_mode():
        moe = grown()
    assert trained(moe, x) == want


@pytest.mark.filterwarnings("ignore:the router knows no rows of what the model did before")
def test_a_loaded_model_too(tmp_path):
    model = network()
    moe = moe_rewrite.convert(model, split=1, example_inputs=model.input(2, 6))
    moe.save_pretrained(tmp_path)
    with torch.inference_mode():
        loaded = moe_rewrite.load(tmp_path, model, model.input(2, 6))
    trained(loaded, model.input(3, 5))


def test_a_model_that_was_made_in_it_is_refused():
    with torch.inference_mode():
        model = network()
    with pytest.raises(
        InputError, match=r"embed.weight of Network was made in torch.inference_mode"
    ):
        moe_rewrite.convert(model, split=1, example_inputs=model.input(2, 6))


@pytest.mark.parametrize("keep", [None, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_is_copied_moved_and_run_in_it_as_outside(dtype, keep):
    moe = moe_rewrite.convert(
        networks.Residual().eval(), split=1, router=TokenRouter(), num_experts=3,
        example_inputs=torch.zeros(2, 5, networks.WIDTH), verify=False,
    ).eval()  # fmt: skip
    randomize(moe, size=0.5)
    x = torch.randn(2, 5, networks.WIDTH)
    with torch.no_grad():
        moe(x)
        whole = copy.deepcopy(moe).to(dtype)
        want = [whole(x.to(dtype)) for _ in range(2)]
    with torch.inference_mode():
        moe = copy.deepcopy(moe)
        moe.offload_experts(keep)
        moe.to(dtype)
        got = [moe(x.to(dtype)) for _ in range(2)]
        moe.offload_experts(keep)
        got += [moe(x.to(dtype))]
    assert all(torch.equal(a, b) for a, b in zip([*want, want[0]], got, strict=True))
