"""What only a GPU shows: the blocks of large sizes, places beyond 2^31, no wait, CUDA graphs."""

import copy

import pytest
import torch
from kernel_inputs import KINDS, NAMES, close, ffn_inputs, gradients, lora_inputs, run_ffn, run_lora
from reference import randomize

import moe_rewrite
from moe_rewrite import FFNExperts, LoRAExperts, TokenRouter
from moe_rewrite.kernels.ffn.op import ffn_experts
from moe_rewrite.kernels.ffn.reference import ffn_experts as reference
from moe_rewrite.kernels.lora import stacked
from moe_rewrite.kernels.lora.op import lora_linear
from moe_rewrite.kernels.lora.reference import lora_linear as lora_reference
from moe_rewrite.kernels.plan import reference as plan_reference
from moe_rewrite.kernels.plan.op import route, sort_plan

pytestmark = pytest.mark.usefixtures("on_device")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "spread", "kinds"), [
    # T, D, H, E, K: blocks of 128, 64, 32 and 16 rows; widths that no block divides
    ((4096, 512, 1408, 8, 2), "random", "gated"), ((700, 1008, 1456, 16, 2), "some", "biases"),
    ((3000, 1000, 1496, 8, 2), "one", "plain biases"), ((90, 1024, 768, 32, 8), "random", "gated"),
    ((2048, 512, 2048, 4, 1), "random", "plain"), ((17, 256, 96, 128, 8), "random", "biases"),
], ids=str)  # fmt: skip
def test_feed_forward_experts(shape, spread, kinds, dtype):
    exact = ffn_inputs(*shape, KINDS[kinds], seed=sum(shape), spread=spread)
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in exact.items()}
    given["gates"] = exact["gates"].float()
    exact = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    plan = sort_plan(given["experts"], shape[3])
    first, second = (gradients(run_ffn(ffn_experts, "silu", plan), given) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    close(first, gradients(run_ffn(reference, "silu"), exact), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [
    ((4096,), (4096,), 1024, 1536, 128), ((5, 321), (5, 1), 1000, 1496, 24),
    ((16,), (16,), 2048, 512, 8), ((3000,), (3000,), 512, 512, 256),
], ids=str)  # fmt: skip
def test_lora_experts(shape, dtype, monkeypatch):
    monkeypatch.setattr(stacked, "fuses", lambda *_: True)
    given = lora_inputs(*shape, dtype)
    first, second = (gradients(run_lora(lora_linear), given) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    exact = {k: v.double() for k, v in given.items()}
    close(first, gradients(run_lora(lora_reference), exact), dtype)


@pytest.mark.parametrize(("rows", "experts", "k"), [(65_536, 256, 16), (300_001, 8, 2)])
def test_routes_and_plans_of_many_rows(rows, experts, k):
    logits = torch.randn(rows, experts).bfloat16()
    gates, chosen = route(logits, k)
    wanted, those = plan_reference.route(logits.double(), k)
    assert torch.equal(chosen, those)
    torch.testing.assert_close(gates.double(), wanted, rtol=1e-5, atol=1e-6)
    chosen[::7, 0] = -1
    plans = sort_plan(chosen, experts), plan_reference.sort_plan(chosen.flatten(), experts)
    assert all(map(torch.equal, *plans))


def test_more_elements_than_32_bits_count():
    T, D, H, E, K = 600_000, 32, 2048, 3, 2  # 2.5e9 hidden values
    given = ffn_inputs(1, D, H, E, K, KINDS["plain"], seed=0)
    weights = {NAMES[k]: given[k].bfloat16() for k in KINDS["plain"]}
    x, gates = torch.randn(T, D).bfloat16().requires_grad_(), torch.rand(T, K)
    experts = torch.rand(T, E).argsort(-1)[:, :K]
    y = ffn_experts(x, gates, experts, None, **weights, activation="relu")
    y.sum().backward()
    for rows in (slice(0, 50), slice(T - 50, T)):
        last = x[rows].detach().double().requires_grad_()
        wide = {k: w.double() for k, w in weights.items()}
        want = reference(last, gates[rows].double(), experts[rows], **wide, activation="relu")
        want.sum().backward()
        got = {"y": y[rows].detach(), "dx": x.grad[rows]}
        close(got, {"y": want.detach(), "dx": last.grad}, torch.bfloat16)


def layer(E=8, K=2, D=256, H=512):
    """(a forward and backward pass that gives its results, the forward pass, its inputs)."""
    given = ffn_inputs(512, D, H, E, K, KINDS["gated"], seed=1)
    weights = {NAMES[k]: given[k].bfloat16().requires_grad_() for k in KINDS["gated"]}
    x, logits = (
        torch.randn(512, D).bfloat16().requires_grad_(),
        torch.randn(512, E).requires_grad_(),
    )

    def forward():
        gates, experts = route(logits, K)
        return ffn_experts(x, gates, experts, sort_plan(experts, E), **weights)

    def step(run=forward):
        leaves = x, logits, *weights.values()
        for leaf in leaves:
            leaf.grad = None
        y = run()
        y.sum().backward()
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    return step, forward, (x, logits)


def test_nothing_waits_for_the_device():
    step, *_ = layer()
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_takes_new_rows_and_routes():
    step, _, inputs = layer()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step()
    with torch.no_grad():
        for given in inputs:
            given.copy_(torch.randn_like(given))
    graph.replay()
    found = [t.clone() for t in held]
    for got, want in zip(found, step(), strict=True):
        assert torch.equal(got, want)


def test_compiled_ops():
    step, forward, _ = layer()
    eager = step()
    for got, want in zip(step(torch.compile(forward, fullgraph=True)), eager, strict=True):
        torch.testing.assert_close(got, want)


def small_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        vocab_size=256,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["pmoe", "upcycle"])
def test_a_converted_llama(kind, dtype, device):
    """Equal when converted, the CPU's logits and tokens with other experts, and it learns."""
    with torch.device("cpu"):
        dense = small_llama().to(device, dtype)
        ids = torch.randint(3, 256, (4, 33)).to(device)
        router = TokenRouter(top_k=2, base=False, init=1.0) if kind == "upcycle" else TokenRouter()
        experts = FFNExperts() if kind == "upcycle" else LoRAExperts(rank=8)
        moe = moe_rewrite.convert(
            dense, mode=kind, split=2, num_experts=4, router=router, experts=experts
        )
        with torch.no_grad():
            want = dense(ids).logits
            limit = 1e-5 if dtype == torch.float32 else 3e-2
            assert (moe(input_ids=ids).logits - want).abs().max() <= limit * want.abs().max()
        randomize(moe)
        apart = copy.deepcopy(moe).cpu()
        with torch.no_grad():
            got, tokens = moe(input_ids=ids).logits, moe.generate(ids[:, :5], max_new_tokens=20)
            there = apart(input_ids=ids.cpu()).logits
            exact = apart.float()(input_ids=ids.cpu()).logits
        error, rounding = ((t.cpu() - exact).abs().max() / exact.abs().max() for t in (got, there))
        assert error <= 1e-4 + 2 * rounding, (error, rounding)
        assert tokens.shape == (4, 25)
        loss = [float(one) for one in learned(moe, ids)]
    assert loss[-1] < 0.9 * loss[0], loss


def learned(moe, ids):
    moe.train()
    parameters = list(moe.trainable_parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(15):
        out = moe(input_ids=ids, labels=ids)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield out.loss.detach()
