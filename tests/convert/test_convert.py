"""convert(): what it refuses, what it reports, what it costs."""

import sys

import architectures
import networks
import pytest
import torch
from sweeps import some
from torch import nn

import moe_rewrite
from benchmarks.speed import conversion
from benchmarks.tools.fresh_process import in_fresh_process
from moe_rewrite import LoRAExperts, MoeRewriteError, TokenRouter


@pytest.fixture(scope="module")
def llama():
    return architectures.build("Llama")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": 99}, "split=99.*model.layers.2"),
        ({"split": 1.5}, "between 0 and 1"),
        ({"split": "model.layers.77"}, "dotted name"),
        ({"mode": "moe"}, "mode='moe'.*'pmoe'"),
        ({"router": "tokens"}, "router='tokens'"),
        ({"router": 3}, "router=3"),
        ({"experts": 8}, "experts=8"),
        ({"num_experts": 0}, "num_experts=0"),
        ({"num_experts": True}, "num_experts=True"),
        ({"backend": "cuda"}, "backend='cuda'"),
        ({"batch_norm": "on"}, "batch_norm='on'"),
        ({"router": TokenRouter(granularity="sequence")}, "look ahead"),
        ({"router": TokenRouter(top_k=1)}, "gate='selected'.*constant"),
        ({"router": TokenRouter(top_k=1, gate="all")}, "init=0.0.*every row"),
        ({"example_inputs": {"pixels": torch.zeros(2, 3)}}, "could not be captured"),
        ({"example_inputs": {"input_ids": "text"}}, "no tensor among the arguments"),
        ({"example_inputs": 3}, "example_inputs=int"),
        ({"experts": LoRAExperts(sites=["nothing"])}, "no site to convert"),
    ],
)
def test_bad_input_is_named_and_the_model_untouched(llama, options, words):
    before = {k: (v.data_ptr(), v._version) for k, v in llama.state_dict().items()}
    with pytest.raises(MoeRewriteError, match=f"(?s){words}"):
        moe_rewrite.convert(llama, **options)
    assert before == {k: (v.data_ptr(), v._version) for k, v in llama.state_dict().items()}
    assert "forward" not in llama.__dict__ and not llama.training


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: TokenRouter(top_k=0), "top_k=0"),
        (lambda: TokenRouter(granularity="word"), "granularity='word'"),
        (lambda: TokenRouter(base=1), "base=1"),
        (lambda: LoRAExperts(rank=0), "rank=0"),
        (lambda: LoRAExperts(alpha=-1), "alpha=-1"),
        (lambda: LoRAExperts(sites="some"), "sites='some'"),
        (lambda: LoRAExperts(sites=[]), "sites="),
    ],
)
def test_specifications_check_themselves(build, words):
    with pytest.raises(MoeRewriteError, match=words):
        build()


def test_a_second_conversion_is_refused(llama):
    moe = moe_rewrite.convert(llama, split=1, verify=False)
    for act in (moe_rewrite.convert, moe_rewrite.inspect):
        with pytest.raises(MoeRewriteError, match="converted already"):
            act(moe)
    with pytest.raises(MoeRewriteError, match="expected a torch.nn.Module"):
        moe_rewrite.convert("llama")


def test_a_dry_run_gives_the_report_alone(llama):
    report = moe_rewrite.convert(llama, split=1, dry_run=True)
    sites = {s for s, _, _ in report.sites}
    assert len(sites) == 2 * 7 and "lm_head" in {n for n, _ in report.rejected}
    assert {n for n, _ in report.numerics} >= {"clean", "split", "freeze", "route"}
    assert all(numerics == "exact" for name, numerics in report.numerics if name != "capture")
    assert {"capture (eval)", "depth", "sites"} <= report.seconds.keys()
    assert "one op with its product" in str(report)


def test_the_head_can_be_taken_in_under_its_own_name():
    model = architectures.build("GPT2")
    assert model.lm_head.weight is model.transformer.wte.weight
    moe = moe_rewrite.convert(model, split=1, experts=LoRAExperts(sites="all+head"))
    assert "lm_head" in {s for s, _, _ in moe.report.sites}
    only = moe_rewrite.convert(model, split=1, experts=LoRAExperts(sites=["c_attn"]))
    assert [s for s, _, _ in only.report.sites] == [
        f"transformer.h.{i}.attn.c_attn" for i in (1, 2)
    ]


class Branching(nn.Module):
    """Control flow on values made of weights, which no capture follows."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, x):
        y = self.layers(x)
        return y if y.sum() > 0 else -y


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, left, right):
        return self.linear(left + right)


class Anything(nn.Module):
    def forward(self, *parts):
        return parts[0]


@pytest.mark.parametrize(
    ("model", "example", "words"),
    [
        (Branching(), torch.randn(2, 4), "test_convert.py:[0-9]+: return .*control flow"),
        (
            nn.Sequential(nn.Linear(4, 4), Branching()),
            torch.randn(2, 4),
            "no site to convert",  # the module runs whole, so nothing is left
        ),
        (Two(), None, "cannot infer inputs for Two.*pass\\s+example_inputs"),
        (Anything(), torch.randn(2, 4), "named arguments"),
        (Two(), (torch.randn(2, 4),) * 3, "too many positional"),
        (Two(), {"left": torch.randn(2, 4), "right": torch.randn(2, 5)}, "could not be captured"),
        (nn.Sequential(nn.ReLU(), nn.ReLU()), torch.randn(2, 4), "depends on both"),
    ],
)
def test_models_that_cannot_be_captured_say_what_to_do(model, example, words):
    with pytest.raises(MoeRewriteError, match=f"(?s){words}"):
        moe_rewrite.convert(model.eval(), split=1, example_inputs=example)


@pytest.mark.parametrize(
    "model",
    [
        networks.Network(["Mlp", "Mlp"]),
        nn.Sequential(*(networks.Mlp() for _ in range(3))),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(2)),
    ],
)
def test_inputs_of_plain_modules_are_inferred(model):
    assert len(moe_rewrite.inspect(model.eval())) >= 2


def test_a_plain_model_on_the_meta_device():
    with torch.device("meta"):
        model = networks.Network(["Mlp", "Attention", "Mlp"]).eval()
    moe = moe_rewrite.convert(model, split=1)
    assert moe.report.equivalence is None and "not checked" in str(moe.report)
    assert all(p.is_meta for p in moe.parameters())
    assert len(moe.expand(1)) == 2 * len(moe.report.sites)
    moe.remove_last()
    assert moe.num_experts == 1


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's /proc")
def test_no_weight_is_copied():
    figures = in_fresh_process(conversion.real, "100MB")
    assert figures["weights_mb"] > 90
    assert figures["share"] < 0.5, figures


@pytest.mark.sweep
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's /proc")
def test_seven_billion_parameters_on_the_meta_device():
    figures = in_fresh_process(conversion.meta, "7B")
    assert figures["parameters"] > 6.5e9 and figures["sites"] == 112
    assert figures["seconds"] < 60 and figures["peak_mb"] < 2000, figures


@pytest.mark.parametrize("dropout", some([0.0, 0.1], [0.1]))
def test_identical_blocks_share_their_code(dropout):
    """In evaluation and in training; there are no more of a deeper model."""
    counts = []
    for layers in (3, 6):
        dense = architectures.with_dropout(architectures.build("Llama", layers=layers), dropout)
        moe = moe_rewrite.convert(dense, split=0.5, num_experts=2)
        example = architectures.example_inputs(dense) | {"use_cache": False}
        arguments = moe.normalized((), example)[0]
        graphs = [moe.train(mode).graph_for(arguments)[0] for mode in (False, True)]
        steps = ([bound.step for _, bound in graph.steps if bound.step.deep] for graph in graphs)
        evaluated, trained = ({step.code for step in of_mode} for of_mode in steps)
        assert (evaluated == trained) == (dropout == 0.0)
        counts.append(len(evaluated))
    assert counts[0] == counts[1] == 2  # a block's, and the head's
