"""Routed LoRA experts on an untouched model, by plain hooks: no code of the library.

Only the parameters are read from the converted model, by their state-dict names.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

EXPERTS = "moe_rewrite.experts."


def added(moe):
    """What conversion added, by state-dict name: the parameters themselves."""
    state = moe.state_dict(keep_vars=True)
    state.pop("moe_rewrite._extra_state")  # which experts these are
    return {k: v for k, v in state.items() if k.startswith("moe_rewrite.")}


def copied(moe):
    """Copies of the tensors that require gradients."""
    return {
        k: v.detach().clone().requires_grad_(isinstance(v, torch.nn.Parameter))
        for k, v in added(moe).items()
    }


def randomize(moe, seed=0, size=0.2):
    """Give every expert and every router row non-zero values; those of wide kernels smaller, so
    that sums over them do not grow without bound."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in added(moe).items():
            taps = p[0, 0].numel() if p.ndim == 4 else 1
            scale = size / taps if ".experts." in name else 0.5 if ".router.rows." in name else None
            if scale is not None:
                p.copy_(torch.randn(p.shape, generator=generator) * scale)


def gates(features, mask, state, granularity, top_k):
    """(..., E): the softmax of the definition, position by position."""
    x = features.float()
    x = F.adaptive_avg_pool2d(x, 4).flatten(1) if x.ndim == 4 else x
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    counts = torch.ones(x.shape[:2]) if mask is None else mask.float()
    if granularity == "prefix":
        means = []
        for t in range(x.shape[1]):
            kept = counts[:, : t + 1].unsqueeze(-1)
            means.append((x[:, : t + 1] * kept).sum(1) / kept.sum(1).clamp_min(1))
        x = torch.stack(means, 1)
    elif granularity == "sequence" and x.ndim == 3:
        x = ((x * counts.unsqueeze(-1)).sum(1) / counts.sum(1, keepdim=True)).unsqueeze(1)
    names = [f"moe_rewrite.router.rows.{e}" for e in range(num_experts(state))]
    rows = torch.stack([state[n] for n in names])
    logits = torch.cat([torch.zeros(*x.shape[:-1], 1), x @ rows[:, :-1].T + rows[:, -1]], -1)
    if top_k is not None:
        low = logits.topk(top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < low, float("-inf"))
    return logits.softmax(-1)[..., 1:]


def num_experts(state):
    return len([k for k in state if k.startswith("moe_rewrite.router.rows.")])


def site_names(state):
    ends = ".a.0"
    return {
        k[len(EXPERTS) : -len(ends)] for k in state if k.startswith(EXPERTS) and k.endswith(ends)
    }


def routed_map(x, output, site, gates, state, alpha_over_rank, conv):
    """The same beside a convolution; gates: (E, B, 1, H, W) or (E, B, 1, 1, 1)."""
    for e, gate in enumerate(gates):
        a, b = (state[f"{EXPERTS}{site}.{part}.{e}"] for part in "ab")
        delta = F.conv2d(F.conv2d(x, a, None, conv.stride, conv.padding, conv.dilation), b)
        output = output + gate * alpha_over_rank * delta
    return output


def routed(x, output, site, gates, state, alpha_over_rank):
    """output + sum over experts of gate * alpha / rank * B A x."""
    if gates.ndim == 3 and x.ndim == 2 and len(x) == gates.shape[0] * gates.shape[1]:
        gates = gates.flatten(0, 1)
    while gates.ndim < x.ndim:
        gates = gates.unsqueeze(1)
    for e in range(num_experts(state)):
        a, b = (state[f"{EXPERTS}{site}.{part}.{e}"] for part in "ab")
        delta = F.linear(F.linear(x, a), b)
        output = output + gates[..., e : e + 1] * alpha_over_rank * delta
    return output


@contextmanager
def hooked(
    model, cut, state, alpha_over_rank, granularity, top_k=None, mask="attention_mask",
    functional=False,
):  # fmt: skip
    """Run `model` with experts: `cut` is the module whose output the router reads.

    state: the converted model's moe_rewrite.* entries. mask: name of the argument that masks the
    rows. functional: find the sites by their weight where it is used, not by module.
    """
    seen = {}

    def before(module, args, kwargs):
        seen.clear()
        seen["mask"] = kwargs.get(mask)

    def gate(module, args, output):
        features = output[0] if isinstance(output, tuple) else output
        seen["gates"] = gates(features, seen["mask"], state, granularity, top_k)

    def delta(name):
        def hook(module, args, output):
            if isinstance(module, torch.nn.Conv2d):
                of_sample = seen["gates"].T.reshape(-1, len(output), 1, 1, 1)
                return routed_map(args[0], output, name, of_sample, state, alpha_over_rank, module)
            return routed(args[0], output, name, seen["gates"], state, alpha_over_rank)

        return hook

    class BySite(TorchFunctionMode):
        sites = {id(_weight(model, n)): n for n in site_names(state)} if functional else {}
        alive = []  # transposed weights, whose ids must stay theirs

        def __torch_function__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            if func is torch.Tensor.t and id(args[0]) in self.sites:
                self.sites[id(output)] = self.sites[id(args[0])]
                self.alive.append(output)
            products = (F.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
            site = self.sites.get(id(args[1])) if func in products else None
            if site is None or "gates" not in seen:
                return output
            return routed(args[0], output, site, seen["gates"], state, alpha_over_rank)

    handles = [model.register_forward_pre_hook(before, with_kwargs=True)]
    handles.append(model.get_submodule(cut).register_forward_hook(gate))
    if not functional:
        handles += [
            model.get_submodule(n).register_forward_hook(delta(n)) for n in site_names(state)
        ]
    try:
        with BySite():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _weight(model, site):
    try:
        return model.get_parameter(f"{site}.weight")
    except AttributeError:
        return model.get_parameter(site)


def assert_gradients_equal(moe, state):
    """Both backward passes done: gradients agree, relative to the largest, and are there."""
    own = added(moe)
    grads = {n: p.grad for n, p in state.items() if p.grad is not None and own[n].requires_grad}
    largest = max(g.abs().max().item() for g in grads.values())
    for name, grad in grads.items():
        atol = 1e-3 * grad.abs().max().item() + 1e-6 * largest
        torch.testing.assert_close(own[name].grad, grad, rtol=1e-3, atol=atol)
    assert sum(bool(g.abs().sum() > 0) for g in grads.values()) > 2
