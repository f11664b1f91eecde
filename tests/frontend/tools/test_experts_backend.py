"""The kernels as transformers' experts: a model's outputs and gradients are those of eager experts."""

import inspect

import pytest
import torch
from sweeps import some

import moe_rewrite
from moe_rewrite import LoRAExperts, MoeRewriteError

transformers = pytest.importorskip("transformers")

from benchmarks.tools.tiny_models import build, families  # noqa: E402

DECORATED = "@use_experts_implementation"
# gates as usual; of its own, interleaved and transposed with biases; no gate; a norm after experts
FEW = ["MixtralForCausalLM", "GptOssForCausalLM", "NemotronHForCausalLM", "MuseSparkForCausalLM"]


def routed():
    """The classes of causal language models whose experts take transformers' forms."""
    return [
        name for task, name, kind in families()
        if task == "causal" and DECORATED in inspect.getsource(inspect.getmodule(kind))
    ]  # fmt: skip


def ids(batch, length):
    return torch.randint(3, 60, (batch, length), generator=torch.Generator().manual_seed(length))


def made(name):
    torch.manual_seed(0)
    model = build(getattr(transformers, name), lambda m: m(input_ids=ids(2, 7)))
    moe_rewrite.register_experts()
    with torch.no_grad():  # so that choices are not close
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def outputs_and_gradients(model, form, given):
    model.set_experts_implementation(form)
    model.zero_grad()
    logits = model(input_ids=given).logits
    logits.float().square().mean().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", some(routed(), FEW))
def test_models_compute_what_eager_experts_compute(name):
    try:
        model = made(name)
    except Exception as error:
        if name in FEW:
            raise
        pytest.skip(f"transformers' class {name} does not build from small sizes: {error}")
    for batch, length in ((2, 7), (1, 1), (3, 12)):
        expected, slopes = outputs_and_gradients(model, "eager", ids(batch, length))
        ours, own_slopes = outputs_and_gradients(model, "moe_rewrite", ids(batch, length))
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
        largest = max(slope.abs().max() for slope in slopes.values())
        for n, slope in slopes.items():
            own = own_slopes.get(n, torch.zeros_like(slope))
            # of one position's queries the gradient is zero, and what is computed is rounding
            scale = slope.abs().max().clamp_min(1e-4 * largest)
            assert (own - slope).abs().max() <= 1e-3 * scale, n


def layer(k=2, experts=5, width=16, hidden=12, act="silu"):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    moe_rewrite.register_experts()
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        hidden_size=width, moe_intermediate_size=hidden, num_experts=experts,
        num_experts_per_tok=k, hidden_act=act,
    )  # fmt: skip
    made = Qwen3MoeExperts(config)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return made


def run(layer, form, x, experts, gates):
    layer.config._experts_implementation = form
    return layer(x, experts, gates)


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "relu2", "quick_gelu", "tanh"])
def test_activations(act):
    own = layer(act=act)
    x, experts = torch.randn(9, 16), torch.stack([torch.randperm(5)[:2] for _ in range(9)])
    gates = torch.rand(9, 2)
    expected = run(own, "eager", x, experts, gates)
    torch.testing.assert_close(run(own, "moe_rewrite", x, experts, gates), expected)


@pytest.mark.parametrize("rows", [0, 1, 30])
def test_rows_of_other_processes_add_nothing(rows):
    own = layer()
    x, gates = torch.randn(rows, 16), torch.rand(rows, 2)
    experts = torch.randint(0, 6, (rows, 2))  # 5 is no expert's
    gates = gates * (experts < 5)
    expected = run(own, "eager", x, experts, gates)
    for act in (own.act_fn, torch.nn.Hardtanh(-9, 9)):  # fused, and with a gate that is not
        own.act_fn = act
        expected = run(own, "eager", x, experts, gates)
        torch.testing.assert_close(run(own, "moe_rewrite", x, experts, gates), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    own = layer().to(dtype)
    x, gates = torch.randn(12, 16, dtype=dtype), torch.rand(12, 2, dtype=dtype)
    experts = torch.stack([torch.randperm(5)[:2] for _ in range(12)])
    ours = run(own, "moe_rewrite", x, experts, gates)
    exact = run(own.double(), "eager", x.double(), experts, gates.double())
    assert ours.dtype == dtype
    bound = 4 * torch.finfo(dtype).eps * exact.abs().max()
    assert (ours.double() - exact).abs().max() <= bound


def test_autocast_computes_in_its_dtype():
    own, x, gates = layer(), torch.randn(12, 16), torch.rand(12, 2)
    experts = torch.stack([torch.randperm(5)[:2] for _ in range(12)])
    with torch.autocast("cpu", torch.bfloat16):
        expected, ours = (run(own, f, x, experts, gates) for f in ("eager", "moe_rewrite"))
    torch.testing.assert_close(ours, expected, rtol=2e-2, atol=2e-2)


def test_a_converted_model_and_its_base_may_run_on_it():
    model = made("Qwen3MoeForCausalLM")
    model.set_experts_implementation("moe_rewrite")
    moe = moe_rewrite.convert(model, split=0.5, experts=LoRAExperts(rank=2, sites="all"))
    for batch, length in ((2, 7), (3, 12)):
        torch.testing.assert_close(
            moe(input_ids=ids(batch, length)).logits, model(input_ids=ids(batch, length)).logits
        )


def test_generation():
    model = made("MixtralForCausalLM")
    tokens = {}
    for form in ("eager", "moe_rewrite"):
        model.set_experts_implementation(form)
        tokens[form] = model.generate(
            ids(2, 6), attention_mask=torch.ones(2, 6), max_new_tokens=6, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
    assert torch.equal(tokens["eager"], tokens["moe_rewrite"])


def test_compiled():
    own = layer()
    x, gates = torch.randn(12, 16), torch.rand(12, 2)
    experts = torch.stack([torch.randperm(5)[:2] for _ in range(12)])
    expected = run(own, "eager", x, experts, gates)
    own.config._experts_implementation = "moe_rewrite"
    compiled = torch.compile(own, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, experts, gates), expected)


def test_without_forms_of_experts_the_version_is_named(monkeypatch):
    import transformers.integrations.moe as module

    monkeypatch.delattr(module, "ExpertsInterface")
    with pytest.raises(MoeRewriteError, match="transformers 5"):
        moe_rewrite.register_experts()
