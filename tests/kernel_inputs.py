"""Fresh inputs of the kernels' tests, gradients of all of them, and how close is close."""

import torch

RELATIVE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


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
