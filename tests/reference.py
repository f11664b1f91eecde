"""Routed LoRA experts by forward hooks on the original module: no code of the library.

Only the parameters are read from the converted model, by their state-dict names.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F


def added(moe):
    """What conversion added, by public state-dict name: the parameters themselves."""
    state = moe.state_dict(keep_vars=True)
    return {k: v for k, v in state.items() if k.startswith("moe_rewrite.")}


def randomize(moe, seed=0):
    """Give every expert and every router row non-zero values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in added(moe).items():
            scale = 0.2 if ".experts." in name else 0.5 if ".router.rows." in name else None
            if scale is not None:
                p.copy_(torch.randn(p.shape, generator=generator) * scale)


@contextmanager
def hooked(model, cut, state, alpha_over_rank, granularity, top_k=None):
    """Run `model` with experts: `cut` is the module whose output the router reads.

    state: {name: tensor} of the converted model's moe_rewrite.* entries. Masks come from the call.
    """
    experts = len([k for k in state if k.startswith("moe_rewrite.router.rows.")])
    rows = torch.stack([state[f"moe_rewrite.router.rows.{e}"] for e in range(experts)])
    prefix = "moe_rewrite.experts."
    sites = {
        k[len(prefix) : -len(".a.0")] for k in state if k.startswith(prefix) and k.endswith(".a.0")
    }
    seen = {}

    def before(module, args, kwargs):
        seen["mask"] = kwargs.get("attention_mask")

    def gate(module, args, output):
        x = (output[0] if isinstance(output, tuple) else output).float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        counts = torch.ones(x.shape[:2]) if seen["mask"] is None else seen["mask"].float()
        if granularity == "prefix":
            means = []
            for t in range(x.shape[1]):  # the plain definition, position by position
                kept = counts[:, : t + 1].unsqueeze(-1)
                means.append((x[:, : t + 1] * kept).sum(1) / kept.sum(1).clamp_min(1))
            x = torch.stack(means, 1)
        elif granularity == "sequence":
            x = ((x * counts.unsqueeze(-1)).sum(1) / counts.sum(1, keepdim=True)).unsqueeze(1)
        logits = torch.cat([torch.zeros(*x.shape[:-1], 1), x @ rows[:, :-1].T + rows[:, -1]], -1)
        if top_k is not None:
            low = logits.topk(top_k, -1).values[..., -1:]
            logits = logits.masked_fill(logits < low, float("-inf"))
        seen["gates"] = logits.softmax(-1)[..., 1:]

    def delta(name):
        def hook(module, args, output):
            total = output
            for e in range(experts):
                a, b = (state[f"{prefix}{name}.{part}.{e}"] for part in "ab")
                g = seen["gates"][..., e : e + 1]
                total = total + g * alpha_over_rank * F.linear(F.linear(args[0], a), b)
            return total

        return hook

    handles = [model.register_forward_pre_hook(before, with_kwargs=True)]
    handles.append(model.get_submodule(cut).register_forward_hook(gate))
    handles += [model.get_submodule(s).register_forward_hook(delta(s)) for s in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
