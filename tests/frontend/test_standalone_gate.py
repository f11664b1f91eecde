"""The gate of the modelling file, compared with the routers that it stands for."""

import itertools

import pytest
import torch
from transformers import DynamicCache

from moe_rewrite import TokenRouter
from moe_rewrite.converted.saving.standalone import gate_facts, gate_tensors
from moe_rewrite.frontend.standalone.modeling import Gate, Plan, RunningMean
from moe_rewrite.routing.ridge_gate import AnalyticGate
from moe_rewrite.routing.token_gate import TokenGate

WIDTH, EXPERTS = 12, 4
X = torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(0)) * 3
MASK = torch.ones(3, 7).long()
MASK[1, :3], MASK[2, 5:] = 0, 0


def router(knows_base=True, **options):
    spec = TokenRouter(init=0.5, projection=32, **options)
    kind = AnalyticGate if spec.fit == "analytic" else TokenGate
    made = kind(spec, WIDTH, torch.device("cpu"))
    made.add(EXPERTS, active=True)
    torch.manual_seed(1)
    with torch.no_grad():
        for row in (*made.rows, *([made.frozen] if spec.fit == "analytic" else [])):
            row.normal_(0, 0.2)
    made.set_active(1, False)
    made.knows_base = knows_base  # as if from sums
    return made


def gate_of(made):
    active = list(made.active_indices())
    gate = Gate(WIDTH, len(active), gate_facts(made))
    gate.load_state_dict(gate_tensors(made, active))
    return gate


CASES = [
    {"granularity": g, "fit": f, "base": b, "top_k": k, "gate": a, "normalize": n}
    for g, f, b, (k, a), n in itertools.product(
        ("token", "prefix", "sequence"), ("gradient", "analytic"), (True, False),
        ((None, "selected"), (2, "selected"), (2, "all")), (True, False),
    )
]  # fmt: skip


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_every_kind_of_token_router_gives_the_same_gates(masked):
    seen = []
    for case in CASES:
        made, plan = router(**case), Plan()
        plan.mask = MASK if masked else None
        theirs = gate_of(made)(X, plan)
        ours = made(X, plan.mask, None)[0].weights
        keep = MASK != 0 if masked and ours.shape[1] > 1 else slice(None)
        torch.testing.assert_close(theirs[keep], ours[keep], rtol=0, atol=2e-6, msg=str(case))
        seen.append(ours.flatten(0, 1).std(0).max())
    assert sum(s > 0.01 for s in seen) > 0.9 * len(CASES)  # gates that differ from row to row


@torch.no_grad()
def test_a_frozen_model_that_the_router_knows_nothing_of_has_no_prior():
    case = {"granularity": "prefix", "fit": "analytic"}
    known, unknown = router(**case), router(knows_base=False, **case)
    for made in (known, unknown):
        ours = made(X, None, None)[0].weights
        torch.testing.assert_close(gate_of(made)(X, Plan()), ours, rtol=0, atol=2e-6)
    assert (known(X, None, None)[0].base > unknown(X, None, None)[0].base).all()


@pytest.mark.parametrize("fit", ["gradient", "analytic"])
@torch.no_grad()
def test_a_prefix_in_pieces_gives_the_gates_of_the_whole(fit):
    made = router(granularity="prefix", fit=fit)
    gate, plan, running = gate_of(made), Plan(), RunningMean()
    whole = made(X, MASK, None)[0].weights
    for start, stop in ((0, 4), (4, 5), (5, 7)):
        plan.mask = MASK[:, :stop]
        plan.before = running if start else None
        piece = gate(X[:, start:stop], plan)
        running.store(*plan.state)
        keep = MASK[:, start:stop] != 0
        torch.testing.assert_close(piece[keep], whole[:, start:stop][keep], rtol=0, atol=2e-6)
    assert running.get_seq_length() == 7


def test_the_mean_follows_its_sequences_through_a_cache():
    cache, running = DynamicCache(), RunningMean()
    running.store(X.cumsum(1), torch.ones(3, 7).cumsum(1))
    cache.layers.append(running)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache.batch_repeat_interleave(2)
    torch.testing.assert_close(running.total[2:4], X.sum(1)[[0, 0]])
    assert RunningMean.of(cache) is running and RunningMean.of(DynamicCache()) is None
    with pytest.raises(ValueError, match="without an assistant"):
        cache.crop(-1)
