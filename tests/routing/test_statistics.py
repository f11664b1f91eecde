"""Statistics of routing, compared with counts by hand."""

import pytest
import torch

from moe_rewrite.routing.layer_plan import GateRule, LayerPlan
from moe_rewrite.routing.plan import RoutingPlan
from moe_rewrite.routing.statistics import RoutingStatistics


def plan(weights, base=None):
    given = torch.tensor(weights)
    rows = tuple(given.shape[:-1])
    base = None if base is None else torch.tensor(base).unsqueeze(-1)
    return RoutingPlan((0, 2), given, base, 3, rows)


def test_shares_entropy_dropped_rows_and_load():
    found = RoutingStatistics()
    assert found.summary(["a", "b", "c"]) == {}
    weights = [[[0.5, 0.5], [1.0, 0.0], [0.0, 0.0]]]
    found.add(plan(weights), torch.tensor([[1, 1, 1]]))
    found.add(plan(weights), torch.tensor([[0, 0, 1]]))  # only the last row counts
    summary = found.summary(["a", "b", "c"])
    assert (
        summary["share/a"] == 1.5 / 4 and summary["share/b"] == 0 and summary["share/c"] == 0.5 / 4
    )
    assert summary["entropy"] == pytest.approx(torch.tensor(2.0).log().item() / 4)
    assert summary["dropped"] == 0.5
    assert summary["load"] == pytest.approx(
        2 / (3 / 3)
    )  # a has two of three choices of three outputs
    assert found.summary(["a", "b", "c"]) == {}


def test_the_frozen_models_gate_counts_and_a_new_expert_starts_anew():
    found = RoutingStatistics()
    found.add(RoutingPlan((0,), torch.ones(2, 1), torch.zeros(2, 1), 1, (2,)))
    found.add(plan([[0.25, 0.25]], base=[0.5]))
    summary = found.summary(["a", "b", "c"])
    assert summary["share/frozen"] == 0.5 and summary["share/a"] == 0.25 and summary["dropped"] == 0


def test_the_rows_of_every_layer_count():
    logits = {"first": torch.zeros(2, 3, 2), "second": torch.tensor([[[0.0, 9.0]]])}
    found = RoutingStatistics()
    found.add(LayerPlan((0, 1), 2, GateRule(1, True, "softmax")).after(logits))
    summary = found.summary(["a", "b"])
    assert summary["share/a"] == pytest.approx(6 / 7) and summary["load"] == pytest.approx(12 / 7)
