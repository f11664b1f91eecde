"""How upcycled experts begin: cut finely, drawn anew in part, scaled where gates do not sum to one."""

import pytest
import torch
from feedforwards import D, Fused, Gated, H, Plain
from standard import dense, logits, train
from torch import nn

import moe_rewrite
from moe_rewrite import FFNExperts, TokenRouter
from moe_rewrite.errors import ConfigError, ConversionError

X = [torch.randn(2, 5, D), torch.randn(3, 1, D), torch.randn(1, 11, D)]


def model(*blocks):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, D), *(b() for b in blocks), nn.Linear(D, 3)).eval()


def upcycled(net, router=None, **options):
    router = router or TokenRouter(top_k=4, base=False, normalize=False, init=0.5)
    experts = FFNExperts(router="layer", **options)
    return moe_rewrite.convert(
        net, mode="upcycle", split="1", router=router, experts=experts, example_inputs=X[0]
    )


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("num", "granularity", "top_k"), [(3, 2, 4), (2, 4, 4), (1, 3, 3)])
def test_parts_of_copies_add_up_to_the_dense_model(num, granularity, top_k, score):
    net = model(Plain, Gated)
    router = TokenRouter(top_k=top_k, base=False, normalize=False, init=0.5)
    moe = upcycled(net, router, num=num, granularity=granularity, score=score)
    assert moe.num_experts == num * granularity
    for training in (False, True):
        for x in X:
            torch.manual_seed(1)
            ours = moe.train(training)(x)
            torch.manual_seed(1)  # of the dropout, whose masks are of other sizes
            theirs = net.train(training)(x)
            assert training or torch.allclose(ours, theirs, atol=1e-5)
    sites = {s.site.name: s for s in moe.expert_sites()}
    assert {s.hidden for s in (site.site for site in sites.values())} == {H // granularity}
    moe(X[0]).sum().backward()
    assert all(p.grad is not None for s in sites.values() for p in s.parameter_lists()[0])


def test_each_hidden_unit_is_in_one_expert_of_a_copy():
    net = model(Gated)
    moe = upcycled(net, num=2, granularity=2)
    (site,) = moe.expert_sites()
    ups = site.stacked(range(4))[site.site.weights.index("1.up.weight")]
    assert torch.equal(torch.cat(ups[:2]), net[1].up.weight)
    assert torch.equal(torch.cat(ups[2:]), net[1].up.weight)
    assert torch.equal(site.rows[0], site.rows[1]) and not torch.equal(site.rows[1], site.rows[2])


@pytest.mark.parametrize("granularity", [1, 2])
@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_a_share_of_hidden_units_is_drawn_anew(share, granularity):
    net = model(Plain, Gated)
    moe = upcycled(net, num=4, granularity=granularity, reinit=share)
    for site in moe.expert_sites():
        of = dict(zip(site.site.weights, site.stacked(range(moe.num_experts)), strict=False))
        dense_of, down = dict(net.named_parameters()), site.site.down[0]
        hidden = H // granularity
        for e in range(moe.num_experts):
            units = slice(e % granularity * hidden, (e % granularity + 1) * hidden)
            up = next(n for n in of if n.endswith("up.weight"))
            rows = (of[up][e] != dense_of[up][units]).any(1)
            columns = (of[down][e] != granularity * dense_of[down][:, units]).any(0)
            assert torch.equal(rows, columns) and rows.sum() == round(share * hidden)
    first, second = (s.stacked(range(2))[0] for s in moe.expert_sites())
    assert not torch.equal(first[0], first[1]) and not torch.equal(second[0], second[1])


def test_what_is_drawn_has_the_dense_weights_mean_and_deviation():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(D, D), Gated(), nn.Linear(D, 3)).eval()
    with torch.no_grad():
        net[1].up.weight.normal_(0.3, 0.02)
    moe = upcycled(net, num=64, reinit=1.0)
    (site,) = moe.expert_sites()
    made = torch.stack(site.stacked(range(64))[site.site.weights.index("1.up.weight")])
    dense_of = net[1].up.weight
    assert abs(made.mean() - dense_of.mean()) < 0.002 and abs(made.std() - dense_of.std()) < 0.002


@pytest.mark.parametrize("granularity", [1, 2])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_scaled_experts_give_the_dense_output_at_equal_logits(score, granularity):
    net = model(Plain, Gated)
    router = TokenRouter(top_k=4, base=False, normalize=False, init=0.0, gate="all")
    options = {"num": 6, "score": score, "granularity": granularity}
    scaled, plain = (upcycled(net, router, scaled=s, **options) for s in (True, False))
    for x in X:
        torch.testing.assert_close(scaled(x), net(x), rtol=1e-4, atol=1e-5)
    assert (plain(X[0]) - net(X[0])).abs().max() > 1e-3


def test_saved_and_loaded(tmp_path):
    net = model(Gated)
    moe = upcycled(net, num=2, granularity=3, reinit=0.5, router=TokenRouter(
        top_k=3, base=False, normalize=False, init=0.5))  # fmt: skip
    moe.save_pretrained(tmp_path)
    again = moe_rewrite.load(tmp_path, net, X[0])
    assert torch.equal(again(X[1]), moe(X[1]))


def test_as_a_standard_checkpoint(tmp_path):
    llama = dense("Llama")
    experts = FFNExperts(num=3, granularity=4)
    moe = moe_rewrite.convert(llama, mode="upcycle", split=1, experts=experts)
    torch.testing.assert_close(logits(moe, 40), logits(llama, 40))
    train(moe)
    moe.save_standard(tmp_path / "folder")
    back = moe_rewrite.from_standard(tmp_path / "folder", dense("Llama"))
    assert torch.equal(logits(back, 40), logits(moe, 40))


def test_what_cannot_be_is_refused():
    net = model(Gated)
    with pytest.raises(ConfigError, match=r"top_k=4: expected a multiple of granularity=3"):
        upcycled(net, num=2, granularity=3)
    with pytest.raises(ConfigError, match="num_experts=5: expected a multiple of granularity=2"):
        moe_rewrite.convert(
            net, mode="upcycle", experts=FFNExperts(granularity=2), num_experts=5,
            example_inputs=X[0],
        )  # fmt: skip
    for option in ({"granularity": 2}, {"reinit": 0.5}, {"scaled": True}):
        with pytest.raises(ConfigError, match="with a router at the cut"):
            upcycled_at_cut = FFNExperts(router="cut", **option)
            moe_rewrite.convert(net, mode="upcycle", experts=upcycled_at_cut, example_inputs=X[0])
    with pytest.raises(ConversionError, match="hidden width 12: expected a multiple of 8"):
        upcycled(net, TokenRouter(top_k=8, base=False, normalize=False), granularity=8)
    with pytest.raises(ConversionError, match="hidden units that are computed one by one"):
        upcycled(model(Fused), granularity=2)
    moe = upcycled(net, num=2, granularity=2)
    for change, reason in ((moe.expand, "parts of copies"), (lambda: moe.remove(0), "is fixed")):
        with pytest.raises(ConfigError, match=reason):
            change()
    with pytest.raises(ConfigError, match="a part of a copy"):
        moe.merge_expert(0)
