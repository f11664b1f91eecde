"""Random values in the experts and the router: outputs and gradients are those of the reference."""

import copy

import torch
from torch.nn.modules.instancenorm import _InstanceNorm

from .compare import cloned, differing, far, leaves, lowest
from .followed import Followed
from .reference import NotFollowed, where_cut


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
    tolerance = lowest(model)
    low = tolerance > 1e-2
    noise = torch.finfo(torch.bfloat16 if low else torch.float32).eps
    want, wanted = run_reference(model, moe, arguments)
    ours, found = run_converted(moe, arguments)
    if error := differing(want, ours, tolerance, floats_only=low):
        rounded, _ = run_reference(model, moe, arguments, noise)
        if not nearer(want, ours, rounded):
            return f"with experts: {error}"
    if wanted is None or found is None:
        return "" if wanted is found else "only one of the two has a gradient"
    if arguments["x"].shape[0] == 1 and any(isinstance(m, _InstanceNorm) for m in model.modules()):
        return ""  # PyTorch's backward is wrong there for gradients in the layout of channels last
    if any(grad is not None and grad.isnan().any() for grad in wanted.values()):
        return ""  # statistics of no samples: NaN times zero is one wherever it is computed
    pairs = {name: (grad, found[name]) for name, grad in wanted.items()}
    error = wrong_gradients(pairs, tolerance)
    if error:  # gradients that nearly vanish, or that layers amplify, may be rounding alone
        _, rounded = run_reference(model, moe, arguments, noise)
        error = wrong_gradients(pairs, tolerance, rounded)
    cut, _, last = cut_of(model, moe, arguments) if error else (0, 0, 0)
    if cut != last:  # several values equal the features; which one has their gradient is not known
        pairs = {name: pair for name, pair in pairs.items() if name.startswith("moe_rewrite.")}
        error = wrong_gradients(pairs, tolerance)
    return error


def nearer(want, ours, rounded):
    """Whether outputs are about as near as those after a change of the weights by rounding, which
    layers may amplify."""
    for a, b, c in zip(*map(leaves, (want, ours, rounded)), strict=True):
        if isinstance(a, torch.Tensor) and a.is_floating_point():
            error, allowed = ((a.double() - t.double()).square().mean() for t in (b, c))
            if not error <= 4 * allowed:
                return False
    return True


def run_reference(model, moe, arguments, noise=0.0):
    """The reference's outputs, and gradients by name (None if there are none). noise: by how much
    of itself every added value is changed first."""
    state, given = copied(moe), cloned(arguments)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, t in state.items():
            if noise and name.startswith("moe_rewrite.") and t.is_floating_point():
                t.mul_(1 + noise * torch.randn(t.shape, generator=generator).to(t.dtype))
    dense, run = followed(model, moe, arguments, state)
    _open_inputs(moe, given)
    outputs = run(given)
    loss = loss_of(outputs)
    if loss is None:
        return outputs, None
    try:
        loss.backward()
    except RuntimeError as error:  # a buffer that one use saved and the next one wrote
        raise NotFollowed(f"the dense model has no gradients: {error}") from None
    own = moe.state_dict(keep_vars=True)
    trained = [n for n in own if own[n].requires_grad]
    grads = {n: state[n].grad for n in trained if n.startswith("moe_rewrite.")}
    if run.given is not None:
        grads = {n: g for n, g in grads.items() if ".router." not in n}
    if not moe.recipe.freeze:
        grads |= {n: p.grad for n, p in dense.named_parameters() if n in trained}
        grads["the input"] = given["x"].grad
    return outputs, grads


def run_converted(moe, arguments):
    """The same of the converted model."""
    given = cloned(arguments)
    _open_inputs(moe, given)
    outputs = moe(**given)
    loss = loss_of(outputs)
    if loss is None:
        return outputs, None
    loss.backward()
    grads = {n: t.grad for n, t in moe.state_dict(keep_vars=True).items()}
    moe.zero_grad(set_to_none=True)
    return outputs, grads | {"the input": given["x"].grad}


def _open_inputs(moe, given):
    if not moe.recipe.freeze and given["x"].is_floating_point():
        given["x"].requires_grad_()


def wrong_gradients(pairs, tolerance, rounded=None):
    """rounded: gradients after a change of the weights by rounding."""
    largest = max(
        (_largest(g) for g, _ in pairs.values() if g is not None and g.numel()), default=0.0
    )
    for name, (want, ours) in pairs.items():
        if want is None and ours is None:
            continue
        want = torch.zeros_like(ours) if want is None else want
        ours = torch.zeros_like(want) if ours is None else ours
        scale = max(_largest(want), 1e-2 * largest, 1e-3)
        moved = None if rounded is None else rounded[name]
        moved = torch.zeros_like(want) if moved is None else moved - want
        if tolerance > 1e-2:  # rounding moves single values over the kink of a ReLU, not most
            want, ours, moved = (
                g.float().square().mean().sqrt() for g in (want, want - ours, moved)
            )
            allowed = 0.5 * want + 1e-2 * max(1.0, largest) + 10 * moved
            error = "is another" if ours > allowed else ""
        else:
            allowed = max(10 * tolerance, 2e-3) + 30 * _largest(moved) / scale
            error = far(want / scale, ours / scale, allowed)
        if error:
            return f"gradient of {name} {error} (scaled by {scale:.1e})"
    return ""


def _largest(tensor):
    """The largest number in it; an empty batch may have written NaN to a buffer."""
    return tensor.nan_to_num(0.0, 0.0, 0.0).abs().max().item() if tensor.numel() else 0.0
