"""Random values in the experts and the router: outputs and gradients are those of the reference."""

import copy

import torch

from .compare import cloned, differing, far, leaves, lowest
from .followed import Followed
from .reference import NotFollowed, positions_first, where_cut


def randomize(moe, seed):
    """Every added parameter gets other values; those of wide kernels and copies change less."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in moe.state_dict(keep_vars=True).items():
            if not name.startswith("moe_rewrite.") or not isinstance(tensor, torch.nn.Parameter):
                continue
            noise = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            if ".router.rows." in name:
                tensor.add_(0.5 * noise)
            elif ".copies." in name:
                tensor.add_(0.1 * noise)
            elif ".experts." in name:
                tensor.add_(0.2 * noise / max(1, tensor[0, 0].numel() if tensor.ndim > 2 else 1))


def synced(model, moe):
    """A copy of the dense model, in eval mode, with the tensors that the converted model has now."""
    dense, state = copy.deepcopy(model).eval(), moe.state_dict()
    dense.load_state_dict({k: state[k] for k in dense.state_dict()})
    for module in dense.modules():
        if hasattr(module, "plain"):
            module.plain = True
    return dense


def unwritten(moe, call):
    """The result of a call, with what it wrote taken back."""
    state = {k: v.clone() for k, v in moe.state_dict().items() if not k.startswith("moe_rewrite.")}
    try:
        return call()
    finally:
        moe.load_state_dict(state, strict=False)


def cut_of(model, moe, arguments):
    """Where the cut is in the dense model's run; see `where_cut`."""
    features = unwritten(moe, lambda: moe.features(**cloned(arguments)))
    return where_cut(synced(model, moe), cloned(arguments), features)


def sites_of(moe):
    """Name of every site -> name of its weight, or the names of a copy's parts. A classification
    head's own columns are none of these, and are empty until expand(classes=...)."""
    found = {}
    for parameters in moe.expert_sites():
        if hasattr(parameters, "a"):
            found[parameters.site.name] = parameters.site.weight
        elif hasattr(parameters, "copies"):
            found[parameters.site.name] = [part.name for part in parameters.site.parts]
    return found


def followed(model, moe, arguments, state):
    """The reference's run, at the cut and with the experts of the converted model."""
    recipe, cut = moe.recipe, cut_of(model, moe, arguments)
    plan = unwritten(moe, lambda: moe.route(**cloned(arguments)))
    dense, active = synced(model, moe), plan.active
    for name, p in dense.named_parameters():
        p.requires_grad_(state[name].requires_grad if name in state else False)
    if recipe.router.policy == "patch" and len(active) < moe.num_experts:
        raise NotFollowed("patches with inactive experts")
    run = Followed(
        dense, state, sites_of(moe), cut, recipe.router, recipe.experts, active,
        getattr(moe.router, "sides", None),
        positions_first(synced(model, moe), cloned(arguments), cut[0]),
    )  # fmt: skip
    if recipe.router.policy != "patch" and recipe.router.fit == "analytic":
        base = plan.base.detach() if plan.base is not None else 0.0
        run.given = plan.weights.detach(), base
    return dense, run


def copied(moe):
    """Copies of what was added, and the dense parameters themselves, by public name."""
    state = moe.state_dict(keep_vars=True)
    return {
        k: v.detach().clone().requires_grad_(v.requires_grad)
        if k.startswith("moe_rewrite.") else v
        for k, v in state.items()
    }  # fmt: skip


def loss_of(outputs):
    """A sum with weights over all outputs that have gradients, or None."""
    total = None
    for i, leaf in enumerate(leaves(outputs)):
        if not isinstance(leaf, torch.Tensor) or not leaf.requires_grad:
            continue
        leaf = torch.view_as_real(leaf) if leaf.is_complex() else leaf
        generator = torch.Generator().manual_seed(i)
        weights = torch.randn(leaf.shape, generator=generator)
        term = (leaf.float() * weights).sum()
        total = term if total is None else total + term
    return total


def wrong_experts(model, moe, arguments):
    """What differs from the reference, in outputs and gradients; empty if nothing does."""
    state, free = copied(moe), not moe.recipe.freeze
    dense, run = followed(model, moe, arguments, state)
    given = [cloned(arguments), cloned(arguments)]
    for one in given:
        if free and one["x"].is_floating_point():
            one["x"].requires_grad_()
    tolerance = lowest(model)
    low = tolerance > 1e-2
    want, ours = run(given[0]), moe(**given[1])
    if error := differing(want, ours, tolerance, floats_only=low):
        return f"with experts: {error}"
    losses = loss_of(want), loss_of(ours)
    if losses[0] is None or losses[1] is None:
        return "" if losses == (None, None) else "only one of the two has a gradient"
    for loss in losses:
        loss.backward()
    own = moe.state_dict(keep_vars=True)
    pairs = {
        n: (t.grad, own[n].grad)
        for n, t in state.items()
        if own[n].requires_grad and n.startswith("moe_rewrite.")
    }
    if run.given is not None:
        pairs = {n: p for n, p in pairs.items() if ".router." not in n}
    if free:
        pairs |= {
            n: (p.grad, own[n].grad)
            for n, p in dense.named_parameters()
            if n in own and own[n].requires_grad
        }
        pairs["the input"] = given[0]["x"].grad, given[1]["x"].grad
    moe.zero_grad(set_to_none=True)
    return wrong_gradients(pairs, tolerance)


def wrong_gradients(pairs, tolerance):
    largest = max(
        (g.abs().max().item() for g, _ in pairs.values() if g is not None and g.numel()),
        default=0.0,
    )
    for name, (want, ours) in pairs.items():
        if want is None and ours is None:
            continue
        want = torch.zeros_like(ours) if want is None else want
        ours = torch.zeros_like(want) if ours is None else ours
        scale = max(want.abs().max().item() if want.numel() else 0.0, 1e-2 * largest, 1e-3)
        if tolerance > 1e-2:  # rounding moves single values over the kink of a ReLU, not most
            root = want.numel() ** 0.5
            want, ours = ((g.float().norm() / root).reshape(1) for g in (want, want - ours))
            error = "is another" if ours > 0.5 * want + 1e-2 * max(1.0, largest) else ""
        else:
            error = far(want / scale, ours / scale, max(10 * tolerance, 2e-3))
        if error:
            return f"gradient of {name} {error} (scaled by {scale:.1e})"
    return ""
