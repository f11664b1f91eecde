"""Fresh inputs of the kernels' tests, gradients of all of them, and how close is close."""

import torch

from moe_rewrite.kernels.ffn.op import ffn_dense, ffn_experts

RELATIVE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


NAMES = {
    "up": "up_EHD", "down": "down_EDH", "gate": "gate_EHD", "up_bias": "up_bias_EH",
    "gate_bias": "gate_bias_EH", "down_bias": "down_bias_ED",
}  # fmt: skip
KINDS = {
    "gated": ["up", "down", "gate"], "biases": list(NAMES), "plain": ["up", "down"],
    "plain biases": ["up", "down", "up_bias", "down_bias"],
}  # fmt: skip


def ffn_inputs(T, D, H, E, K, kinds, seed, spread="random"):
    """fp64 inputs of `ffn_experts`, by name. spread: how rows choose experts ("random"; "one": all
    take expert E-1 first; "some": the upper half of the experts gets no row)."""
    torch.manual_seed(seed)
    of = {"random": E, "one": E, "some": max(K, E // 2)}[spread]
    scores = torch.rand(T, of)
    if spread == "one":
        scores[:, E - 1] = 2.0
    experts = scores.argsort(-1, descending=True)[:, :K]
    sizes = {"up": (E, H, D), "down": (E, D, H), "gate": (E, H, D)}
    sizes |= {"up_bias": (E, H), "gate_bias": (E, H), "down_bias": (E, D)}
    weights = {k: torch.randn(sizes[k]).double() / sizes[k][-1] ** 0.5 for k in kinds}
    gates = torch.rand(T, K).double()
    return {"x": torch.randn(T, D).double(), "gates": gates, "experts": experts} | weights


def run_ffn(op, activation, plan=None):
    def call(g):
        weights = {NAMES[k]: g[k] for k in NAMES if k in g}
        given = (g["x"], g["gates"]) if op is ffn_dense else (g["x"], g["gates"], g["experts"])
        given = (*given, plan) if op is ffn_experts else given
        return op(*given, **weights, activation=activation)

    return call


def lora_inputs(lead, given, D, O, R, dtype=torch.float32, bias=True):  # noqa: E741
    torch.manual_seed(D + R)
    found = {"x": torch.randn(*lead, D), "weight": torch.randn(O, D) / D**0.5}
    found |= {"scales": torch.rand(*given, R), "a": torch.randn(R, D) / D**0.5}
    found |= {"b": torch.randn(O, R) / max(R, 1) ** 0.5} | (
        {"bias": torch.randn(O)} if bias else {}
    )
    return {k: v.to(dtype) for k, v in found.items()}


def run_lora(op):
    return lambda g: op(g["x"], g["weight"], g.get("bias"), g["scales"], g["a"], g["b"])


def gradients(run, given):
    """The output of ``run(given)`` and the gradients of a fixed random product with it, by name;
    those of a list of tensors stacked."""
    leaves = {}
    for name, value in given.items():
        if isinstance(value, list):
            leaves[name] = [v.detach().clone().requires_grad_() for v in value]
        else:
            leaf = value.detach().clone()
            leaves[name] = leaf.requires_grad_() if leaf.is_floating_point() else leaf
    y = run(leaves)
    generator = torch.Generator(y.device).manual_seed(1)
    weight = torch.randn(y.shape, generator=generator, dtype=torch.float64, device=y.device)
    y.backward(weight.to(y))
    found = {"y": y.detach()}
    for name, leaf in leaves.items():
        if isinstance(leaf, list):
            found[name] = torch.stack([v.grad for v in leaf])
        elif leaf.requires_grad:
            found[name] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return found


def close(got, expected, dtype=torch.float32):
    """Largest error of each tensor within the dtype's share of the expected one's largest value."""
    assert got.keys() == expected.keys()
    for name, value in got.items():
        want = expected[name].double()
        assert value.shape == want.shape, (name, value.shape, want.shape)
        if want.numel():
            error = (value.double() - want).abs().max().item()
            limit = RELATIVE[dtype] * max(want.abs().max().item(), 1e-3)
            assert error <= limit, f"{name}: error {error:.3g} above {limit:.3g}"
