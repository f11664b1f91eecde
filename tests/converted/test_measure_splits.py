"""``split="auto"`` by measurement: the features at every cut are those of a conversion there, and the
earliest cut at which tasks are told apart is taken."""

import copy

import pytest
import torch
from architectures import build
from factories import cnn, mlp
from pages import read_page
from sweeps import some
from torch import nn
from writers import WRITERS, given

import moe_rewrite
from moe_rewrite import RegionExperts, TokenRouter
from moe_rewrite.converted.measure_splits import _Measurement
from moe_rewrite.errors import ConfigError, ConversionError, InputError, SplitError
from moe_rewrite.frontend.choose_host import host_of
from moe_rewrite.frontend.weights.structural_copy import structural_copy
from moe_rewrite.passes.recipe import make_recipe

CPU = torch.device("cpu")


class Pairs(nn.Module):
    """A block adds what it makes of each pair of neighbours: before the first, the order of tokens
    shows in no mean over them."""

    def __init__(self, blocks=3):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(8, 16)
        self.blocks = nn.ModuleList(nn.Linear(32, 16) for _ in range(blocks))
        self.head = nn.Linear(16, 2)

    def forward(self, ids):
        x = self.table(ids)
        for block in self.blocks:
            x = x + block(torch.cat([x, x.roll(1, 1)], -1)).relu()
        return self.head(x.mean(1))


def ordered(step, count=12):
    """Texts of the same tokens: 0 1 2 3 4 5 6 7 in a circle, by steps of 1 or 3."""
    starts = torch.arange(count).unsqueeze(1)
    return [(starts + step * torch.arange(8)) % 8]


ORDERS = {"by one": ordered(1), "by three": ordered(3)}


def read(model, *batches):
    """What a measurement reads of each batch: features and mask, by split."""
    host = host_of(structural_copy(model))
    measurement = _Measurement(host, make_recipe(), CPU)
    with torch.no_grad():
        return [measurement._features(batch) for batch in batches], measurement


def ids(batch, length, seed=0):
    drawn = torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(drawn)
    mask[0, length - 2 :] = 0
    return {"input_ids": drawn, "attention_mask": mask}


def images(batch, size=32, channels=3):
    return torch.randn(batch, channels, size, size)


MODELS = {
    "Llama": (lambda: build("Llama", layers=2), [ids(3, 9), ids(2, 14), ids(1, 6)]),
    "ResNet": (lambda: cnn().eval(), [images(3), images(1)]),
    "ViT": (lambda: build("ViT"), None),
    "mlp": (mlp, [torch.randn(3, 16), torch.randn(5, 16)]),
    "Pairs": (Pairs, [*ordered(1), ordered(3)[0][:1, :5]]),
}


@pytest.mark.parametrize("name", some(MODELS, few=["ResNet", "Pairs"]))
def test_features_are_those_of_a_conversion_at_each_split(name):
    make, batches = MODELS[name]
    model = make().eval()
    if batches is None:
        batches = [images(3, model.config.image_size, model.config.num_channels)]
    found, measurement = read(model, *batches)
    possible = [cut.index for cut in measurement.cuts if not cut.problem]
    assert possible and all(list(of) == possible for of in found)
    for split in possible[-1:] if name == "Llama" else (possible[0], possible[-1]):
        moe = moe_rewrite.convert(model, split=split, example_inputs=batches[0], verify=False)
        for batch, of in zip(batches, found, strict=True):
            features, mask = of[split]
            call = batch if isinstance(batch, dict) else {next(iter(moe.host.signature.parameters)): batch}  # fmt: skip
            torch.testing.assert_close(features, moe.features(**call), rtol=1e-5, atol=1e-5)
            assert mask is None or torch.equal(mask, batch["attention_mask"])


def test_the_cut_comes_after_what_tells_tasks_apart():
    model = Pairs()
    curve = moe_rewrite.inspect(model, ordered(1)[0], calibration=ORDERS).curve
    before, *others = curve.points
    assert before.accuracy < 0.7 and others[0].accuracy > 0.95 and curve.split == 1
    assert [p.after for p in curve.points] == sorted((p.after for p in curve.points), reverse=True)
    tokens = {"low": [torch.randint(0, 4, (9, 8))], "high": [torch.randint(4, 8, (9, 5))]}
    assert moe_rewrite.inspect(model, ordered(1)[0], calibration=tokens).curve.split == 0


def test_convert_takes_it_and_a_saved_one_loads_without(tmp_path):
    model, example = Pairs(), ordered(1)[0]
    moe = moe_rewrite.convert(model, example_inputs=example, calibration=ORDERS)
    assert moe.report.split == "block 1 (blocks.1)"
    assert "tasks told apart" in str(moe.report) and "1 (chosen)" in moe.report._repr_html_()
    depth = moe_rewrite.inspect(model, example, calibration=ORDERS)
    assert depth.curve == moe.report.curve and depth.resolve("auto")[0] == 1
    assert str(depth.curve) in str(depth) and depth.resolve(2)[0] == 2
    moe.save_pretrained(tmp_path / "saved")
    assert moe_rewrite.load(tmp_path / "saved", model, example).report.split == moe.report.split
    assert moe_rewrite.convert(model, example_inputs=example, dry_run=True).curve is None


def test_pages_show_it(tmp_path):
    model, example = Pairs(2), ordered(1)[0]
    moe_rewrite.inspect(model, example, html=tmp_path / "dense.html", calibration=ORDERS)
    page = read_page(tmp_path / "dense.html")
    assert page.facts["start"] == 1 and page.tags.count("meter") == 2
    points = page.facts["curve"]["points"]
    assert [p["chosen"] for p in points] == [False, True] and "1 (chosen)" in page.of("td")
    moe = moe_rewrite.convert(model, example_inputs=example, calibration=ORDERS)
    moe.report.html(tmp_path / "moe.html", example)
    assert read_page(tmp_path / "moe.html").facts["curve"] == page.facts["curve"]


def test_nothing_of_the_model_is_changed():
    model = build("Llama", layers=2).train()
    model.model.layers[0].eval()
    model.generation_config.max_new_tokens = 7
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    config, generation = copy.deepcopy(model.config), copy.deepcopy(model.generation_config)
    attributes = [set(vars(m)) for m in model.modules()]
    random = torch.random.get_rng_state()
    tasks = {"a": [ids(3, 9)], "b": [ids(3, 7, seed=1)]}
    moe_rewrite.inspect(model, calibration=tasks)
    assert torch.equal(random, torch.random.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    assert attributes == [set(vars(m)) for m in model.modules()]
    assert model.config.to_dict() == config.to_dict()
    assert model.generation_config.to_dict() == generation.to_dict()
    assert all(torch.equal(t, tensors[n]) for n, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", some(WRITERS, few=[next(iter(WRITERS))]))
def test_models_that_write_in_a_call(name):
    """Every batch is read from the model as it is, and each feature where it is made."""
    make, _, _ = WRITERS[name]
    model = make().eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    example = given(name)
    (first, again), measurement = read(model, example, example)
    for index, (features, _) in first.items():
        assert torch.equal(features, again[index][0])
        converted = moe_rewrite.convert(
            copy.deepcopy(model), split=index, example_inputs=example, verify=False
        )
        (argument,) = converted.host.signature.parameters
        expected = converted.features(**{argument: example})
        torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def nan_after_a_block():
    model = Pairs()
    with torch.no_grad():
        model.blocks[1].bias[0] = torch.inf
    return model


ONE = ordered(1)[0]


@pytest.mark.parametrize(
    ("calibration", "options", "error", "message"),
    [
        ({"a": [ONE]}, {}, InputError, "1 task: expected two or more"),
        ({}, {}, InputError, "0 tasks"),
        ([ONE, ONE], {}, InputError, "calibration=list: expected a dict"),
        ({"a": [ONE], "b": ONE}, {}, InputError, r"calibration\['b'\]=Tensor: expected a list"),
        ({"a": [ONE], "b": {"ids": ONE}}, {}, InputError, r"\['b'\]=dict: expected a list"),
        ({"a": [ONE], "b": []}, {}, InputError, r"calibration\['b'\]: 0 samples"),
        ({"a": [], "b": [ONE]}, {}, InputError, r"calibration\['a'\]: 0 samples"),
        ({"a": [ONE], "b": [ONE[:1]]}, {}, InputError, r"\['b'\]: 1 sample; expected two"),
        (ORDERS, {"split": 1}, ConfigError, "split=1 with calibration: expected 'auto'"),
        (ORDERS, {"mode": "carve"}, ConfigError, "calibration"),
        (ORDERS, {"mode": "upcycle"}, ConfigError, "every layer has a router"),
        (ORDERS, {"experts": RegionExperts()}, SplitError, "none of its blocks"),
    ],
)
def test_wrong_calibration(calibration, options, error, message):
    with pytest.raises(error, match=message):
        moe_rewrite.convert(Pairs(), example_inputs=ONE, calibration=calibration, **options)


def test_features_that_are_not_finite():
    with pytest.raises(InputError, match=r"\['by one'\]: the features before block 2 .*infinities"):
        moe_rewrite.inspect(nan_after_a_block(), ONE, calibration=ORDERS)


def test_models_without_values_and_with_several_mainlines():
    with torch.device("meta"):
        model = Pairs()
    with pytest.raises(InputError, match="meta device"):
        moe_rewrite.convert(model, example_inputs=ONE.to("meta"), calibration=ORDERS)
    hooked = Pairs()
    hooked.blocks[0].register_forward_hook(lambda *a: None)
    with pytest.raises(ConversionError, match="has hooks"):
        moe_rewrite.inspect(hooked, ONE, calibration=ORDERS)


def test_a_gate_of_ones_own_is_asked_in_closed_form():
    router = TokenRouter(granularity="token", top_k=1, gate="all", init=0.5)
    moe = moe_rewrite.convert(Pairs(), router=router, example_inputs=ONE, calibration=ORDERS)
    assert moe.report.curve.points[0].accuracy < 0.7 and "granularity='token'" in moe.report.router
