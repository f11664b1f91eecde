"""Every possible split says what converting there says."""

import pytest
import torch
from architectures import build
from factories import cnn
from sweeps import some

import moe_rewrite
from moe_rewrite import FFNExperts, LoRAExperts, RegionExperts
from moe_rewrite.errors import ConfigError
from moe_rewrite.frontend.choose_host import host_of
from moe_rewrite.frontend.weights.structural_copy import structural_copy
from moe_rewrite.passes.possible_splits import possible_splits
from moe_rewrite.passes.recipe import make_recipe


def splits_of(model, *experts, split="auto"):
    host = host_of(structural_copy(model))
    recipes = [make_recipe(split=split, experts=e) for e in experts]
    return possible_splits(host, recipes, host.arguments(None))


MODELS = {
    "Llama": (lambda: build("Llama"), LoRAExperts()),
    "ViT": (lambda: build("ViT"), FFNExperts()),
    "ResNet": (lambda: cnn().eval(), RegionExperts(halo=False)),
}


CASES = [(name, split) for name in MODELS for split in range(3)]


@pytest.mark.parametrize(("name", "split"), some(CASES, few=[("ResNet", 1)]))
def test_a_split_is_as_convert_reports_it(name, split):
    make, experts = MODELS[name]
    model = make()
    depth, splits = splits_of(model, experts)
    assert [s.index for s in splits] == list(range(len(depth))) == [0, 1, 2]
    report = moe_rewrite.convert(model, split=split, experts=experts, dry_run=True)
    found = splits[split]
    (kind,) = found.kinds
    assert found.cut == report.cut and report.split == f"block {split} ({found.label})"
    assert list(kind.takes) == report.sites and kind.takes
    assert list(kind.rejected) == report.rejected
    assert str(kind.router) == report.router
    assert set(kind.notes) <= set(report.notes)


def test_a_llama_from_end_to_end():
    model = build("Llama", layers=2)
    depth, splits = splits_of(model, LoRAExperts(), RegionExperts())
    weights = sum(p.numel() for p in model.parameters())
    assert sum(b.params for b in depth.parts) == weights
    for split in splits:
        assert (*split.shallow, *split.deep) == depth.parts
        features, *others = split.crosses
        assert features.routed and features.shape == ("batch", "sequence", "32")
        assert not any(c.routed for c in others)
    rotary = [c for c in splits[1].crosses if c.maker == "model.rotary_emb"]
    assert len(rotary) == 2 and {c.shape for c in rotary} == {("1", "sequence", "8")}
    assert splits[0].crosses[1].maker == "the call"  # the mask, which the first layer reads
    _, regions = splits[0].kinds
    assert not regions.takes and "neither a feature map" in regions.problem


@pytest.mark.sweep
def test_a_problem_is_the_error_of_convert():
    model = build("Llama", layers=2)
    depth, (split, _) = splits_of(model, RegionExperts())
    assert str(depth) == str(moe_rewrite.inspect(model))
    with pytest.raises(ConfigError, match="neither a feature map") as error:
        moe_rewrite.convert(model, split=0, experts=RegionExperts(), dry_run=True)
    assert str(error.value) == split.kinds[0].problem


def test_a_model_that_cannot_be_cut_before_its_first_block_says_so():
    model = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Embedding(9, 8) if not i else torch.nn.Linear(8, 8), torch.nn.ReLU()) for i in range(3)])  # fmt: skip
    host = host_of(structural_copy(model))
    _, (first, *others) = possible_splits(
        host, [make_recipe()], host.arguments(torch.ones(2, 5, dtype=torch.long))
    )
    assert "a later block" in first.problem and not first.kinds
    assert all(not s.problem and s.kinds for s in others)
