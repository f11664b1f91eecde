"""Branches of a model's code on values of a call are conditions of its graph."""

import pytest
import torch
from networks import WIDTH, Mlp
from torch import nn

import moe_rewrite
from moe_rewrite.errors import CaptureError
from moe_rewrite.frontend.tracing import value_branches

IDS = torch.arange(15).view(3, 5)


class Branching(nn.Module):
    """kind: what is branched on."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.embed = nn.Embedding(40, WIDTH)
        self.layers = nn.ModuleList(Mlp() for _ in range(4))

    def forward(self, ids, mask):
        ids.masked_fill_(ids == 39, 2)  # what is branched on is what was written
        x = self.embed(ids)
        if self.kind == "number" and ids.max().item() > 20:
            x = x * 2
        if self.kind == "size" and ids.max().item() > ids.shape[1] + 10:
            x = x + 1
        for layer in self.layers:
            y = layer(x)
            if self.kind == "mask" and mask.any():
                y = y.masked_fill(mask.unsqueeze(-1), 0.0)
            x = x + y
        if self.kind == "features" and x.mean() > 0:
            x = -x
        return x


def converted(kind, **options):
    model = Branching(kind).eval()
    example = {"ids": IDS.clone(), "mask": torch.zeros(3, 5, dtype=torch.bool)}
    return model, moe_rewrite.convert(model, split=2, example_inputs=example, **options)


def given(largest=14, masked=False, batch=3, length=5):
    ids, mask = torch.zeros(batch, length, dtype=torch.long), torch.zeros(batch, length) > 0
    ids[0, -1], mask[0, 1] = largest, masked
    return {"ids": ids, "mask": mask}


@pytest.mark.parametrize("kind", ["mask", "number", "size"])
@torch.no_grad()
def test_each_branch_has_a_graph(kind):
    model, moe = converted(kind)
    for call in (given(), given(39, masked=True), given(16, length=9), given()):
        alone = {name: t.clone() for name, t in call.items()}
        assert torch.equal(moe(**call), model(**alone))
        assert torch.equal(call["ids"], alone["ids"])
    (said, *others) = [c for c in moe.report.conditions if "the number read in" in c]
    assert kind != "mask" or (said.endswith("!= 1") and not others)  # once for all blocks


def test_a_branch_on_features_is_refused():
    with pytest.raises(CaptureError, match=r"x\.mean\(\) > 0"):
        converted("features")


def test_where_pytorch_lacks_what_is_used_it_is_an_error_of_the_trace(monkeypatch):
    monkeypatch.setattr(value_branches, "KNOWN", False)
    with pytest.raises(CaptureError, match=r"ids\.max\(\)"):
        converted("number")


def test_values_of_meta_tensors_are_unknown():
    model = Branching("number").eval().to("meta")
    example = {"ids": IDS.to("meta"), "mask": torch.zeros(3, 5, dtype=torch.bool, device="meta")}
    with pytest.raises(CaptureError, match=r"ids\.max\(\)"):
        moe_rewrite.inspect(model, example)


class Windows(nn.Module):
    """Counts windows of its features, by quotients that torch.div makes tensors of."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Mlp() for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            y = layer(x)
            count = torch.div(y.shape[1], 2, rounding_mode="trunc").item()
            x = x + y / count if 2 * count - 1 > 3 else x - y
        return x


@torch.no_grad()
def test_numbers_that_follow_from_lengths_are_constants_of_a_graph():
    model = Windows().eval()
    moe = moe_rewrite.convert(model, split=2, example_inputs=torch.randn(2, 4, WIDTH))
    for size in ((3, 4), (2, 7)):
        x = torch.randn(*size, WIDTH)
        assert torch.equal(moe(x), model(x))


class Clamped(nn.Module):
    """Clamps its weights where it trains."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Mlp() for _ in range(4))
        self.mix = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        for layer, mix in zip(self.layers, self.mix, strict=True):
            if mix.training:
                mix.weight.data.clamp_(-0.01, 0.01)
            x = x + layer(x) + mix(x)
        return x


def test_weights_that_are_written_by_data_are_the_converted_models_own():
    model, x = Clamped().eval(), torch.randn(2, 5, WIDTH)
    before = [mix.weight.clone() for mix in model.mix]
    moe = moe_rewrite.convert(model, split=2, example_inputs=x).train()
    moe(x)
    assert all(torch.equal(mix.weight, w) for mix, w in zip(model.mix, before, strict=True))
    largest = [float(moe.state_dict()[f"mix.{i}.weight"].abs().max()) for i in range(4)]
    assert max(largest[2:]) <= 0.01 + 1e-6 < min(largest[:2])  # what is shallow does not train
