"""An error that nobody foresaw is said to be a bug, and leaves nothing half done."""

import pytest
import torch
from torch import nn

import moe_rewrite
from moe_rewrite.errors import CaptureError, InvariantError
from moe_rewrite.passes.clean import Clean


def model():
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))


def test_it_names_the_model_and_asks_for_a_report(monkeypatch):
    def broken(self, program, decisions):
        raise KeyError("something")

    monkeypatch.setattr(Clean, "apply", broken)
    with pytest.raises(
        InvariantError, match="Sequential could not be .*KeyError: 'something'.*bug"
    ):
        moe_rewrite.convert(model(), split=2, example_inputs=torch.zeros(2, 4))


def test_a_graph_that_does_not_run_is_refused(monkeypatch):
    def broken(*given, **options):
        raise TypeError("not this way")

    monkeypatch.setattr("moe_rewrite.converted.verify._compared", broken)
    with pytest.raises(InvariantError, match="not this way"):
        moe_rewrite.convert(model(), split=2, example_inputs=torch.zeros(2, 4))
    monkeypatch.setattr(
        "moe_rewrite.converted.verify._compared",
        lambda *_: (_ for _ in ()).throw(RuntimeError("x")),
    )
    with pytest.raises(CaptureError, match="does not run: RuntimeError: x"):
        moe_rewrite.convert(model(), split=2, example_inputs=torch.zeros(2, 4))
