"""Of many experts with a top k, a call runs those that its rows go to."""

import architectures
import pytest
import torch
from conversions import fresh
from torch import nn

import moe_rewrite
from moe_rewrite import LoRAExperts, TokenRouter
from moe_rewrite.kernels.head import reference as head

MANY = 40


def filled(moe):
    """Every expert another map, every row of the router another direction."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for site in moe.expert_sites():
            for of_part in site.parameter_lists():
                for p in of_part:
                    p.copy_(torch.randn(p.shape, generator=draw) * 0.3)
        for row in moe.router.rows:
            row.copy_(torch.randn(row.shape, generator=draw) * 3)
    return moe.eval()


@pytest.fixture(scope="module")
def llama():
    options = {"split": 1, "num_experts": MANY, "experts": LoRAExperts(2), "verify": False}
    router = TokenRouter(top_k=1, granularity="prefix", gate="all", init=1.0)
    return filled(fresh(architectures.build("Llama", layers=2), router=router, **options))


def ran(moe, monkeypatch):
    """The experts that sites are asked for, call by call."""
    asked = []
    site = moe.expert_sites()[0]
    real = type(site).stacked
    monkeypatch.setattr(
        type(site), "stacked", lambda self, active: asked.append(active) or real(self, active)
    )
    return asked


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 1), (2, 7)])
def test_outputs_are_those_with_every_expert(llama, monkeypatch, batch, length):
    """Where gradients are asked for, every expert that is on runs."""
    ids = torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(length))
    want = llama(input_ids=ids, use_cache=False).logits.detach()
    plan = llama.route(input_ids=ids)
    asked = ran(llama, monkeypatch)
    with torch.no_grad():
        got = llama(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    taken = set((plan.selected.unique() - 1).tolist()) - {-1}
    assert len(taken) * 8 > MANY or set(map(tuple, asked)) == {tuple(sorted(taken))}
    with torch.no_grad():
        _, told = llama.with_plan(input_ids=ids, use_cache=False)
        assert told.active == tuple(range(MANY)) and torch.equal(told.gates, plan.gates)


def test_where_all_rows_are_the_frozen_models_one_expert_stays(llama, monkeypatch):
    ids = torch.randint(3, 97, (2, 5))
    asked = ran(llama, monkeypatch)
    with torch.no_grad():
        plan = llama.route(input_ids=ids)
        none = type(plan)(
            plan.active, torch.zeros_like(plan.weights), torch.ones_like(plan.base),
            plan.num_experts, plan.rows, top_k=1,
        )  # fmt: skip
        with llama.use_plan(none):
            got = llama(input_ids=ids, use_cache=False).logits
        want = llama.to_dense()(input_ids=ids, use_cache=False).logits
    assert set(map(tuple, asked)) == {(0,)}
    torch.testing.assert_close(got, want)


@torch.no_grad()
def test_tokens_are_those_of_whole_texts(llama):
    ids = torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(3))
    whole = llama(input_ids=ids, use_cache=False).logits
    state = llama(input_ids=ids[:, :3]).past_key_values
    for at in range(3, 6):
        out = llama(input_ids=ids[:, at : at + 1], past_key_values=state)
        torch.testing.assert_close(out.logits[:, 0], whole[:, at], rtol=1e-4, atol=1e-4)
        state = out.past_key_values


def test_every_class_is_weighed_though_few_experts_run(monkeypatch):
    """Columns of a head belong to the experts that are on, whoever runs; many alike are one product."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(2)]
    dense = nn.Sequential(*layers, nn.Linear(8, 3)).eval()
    router = TokenRouter(top_k=1, gate="all", init=1.0)
    moe = moe_rewrite.convert(
        dense, split=1, router=router, example_inputs=torch.zeros(2, 8), verify=False
    )
    classes = [3, *(2 for _ in range(20))]
    for number, count in enumerate(classes, 1):
        moe.expand(1, classes=count)
        moe.activate(number)
    moe.deactivate(2)
    moe.deactivate(3)
    filled(moe)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    for rows in (x, x[:1]):
        with torch.no_grad():
            got, plan = moe.with_plan(rows)
        monkeypatch.setattr(head, "MANY", 1000)
        want = moe(rows)  # every expert that is on runs, and each has a product of its own
        monkeypatch.undo()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        parts = got.split([3, *classes], 1)
        for e, part in enumerate(parts[1:], 1):
            if e in (2, 3):
                assert (part == -torch.inf).all()
            else:
                gate = plan.gates[:, e + 1].clamp_min(torch.finfo(torch.float32).tiny).log()
                torch.testing.assert_close(part.logsumexp(-1), gate, rtol=1e-4, atol=1e-4)
