"""Training mode: the dense model's output under a seed, and a step that changes added parameters."""

import copy

import torch
from torch.nn.modules.batchnorm import _NormBase

from .compare import cloned, differing, lowest
from .experts import cut_of, loss_of, synced
from .reference import Counted, NotFollowed


def deep_modules(dense, arguments, cut):
    """Names of the modules that run after the cut, if only in part."""
    shallow, deep, arguments = set(), set(), cloned(arguments)  # no copies are counted below
    with torch.no_grad(), Counted(lambda number, *rest: rest[-1]) as counted:
        for name, module in dense.named_modules():
            module.register_forward_hook(
                lambda *_, name=name: (deep if counted.number > cut else shallow).add(name)
            )
        dense(**arguments)
    if shallow & deep:
        raise NotFollowed("a module runs before the cut, where it is frozen, and after it")
    return deep


def in_training(model, moe, arguments, batch_norm):
    """A copy of the dense model in the mode in which the converted one trains."""
    cut, _, last = cut_of(model, moe.eval(), arguments)
    if cut != last:  # such as before and after a dropout
        raise NotFollowed("several values equal the features")
    deep = deep_modules(synced(model, moe), arguments, cut)
    dense = synced(model, moe).train()
    for name, module in dense.named_modules():
        statistics = isinstance(module, _NormBase) and batch_norm == "frozen"
        if statistics or (moe.recipe.freeze and name not in deep):
            module.training = False
    if batch_norm == "frozen":
        for name in writers(dense, arguments):
            dense.get_submodule(name).training = False
    return dense


def writers(dense, arguments):
    """Modules whose buffers a call in training mode writes."""
    run = copy.deepcopy(dense)
    run(**cloned(arguments))
    before = dict(dense.named_buffers())
    changed = {n for n, b in run.named_buffers() if not torch.equal(b, before[n])}
    return {n.rpartition(".")[0] for n in changed}


def wrong_training(model, moe, arguments):
    """What differs from the dense model in training mode; empty if nothing does."""
    dense = in_training(model, moe, arguments, moe.recipe.batch_norm)
    moe.train()
    with moe.disable_experts(), torch.no_grad():
        moe(**cloned(arguments))  # captured and compared here
        dense.load_state_dict({k: moe.state_dict()[k] for k in dense.state_dict()})
        torch.manual_seed(1)
        want = dense(**cloned(arguments))
        torch.manual_seed(1)
        ours = moe(**cloned(arguments))
    low = lowest(model) > 1e-2
    error = differing(want, ours, lowest(model), floats_only=low)
    return f"in training mode: {error}" if error else ""


def require_gradients(dense, arguments, error):
    """Raise NotFollowed if the dense model's backward raises the same, as after a write to a buffer
    that a use before it saved."""
    try:
        loss_of(dense(**cloned(arguments))).backward()
    except RuntimeError as its:
        if str(its).partition(":")[0] == str(error).partition(":")[0]:
            raise NotFollowed(f"the dense model has no gradients: {its}") from None


def wrong_step(model, moe, arguments):
    """What an optimiser's step changed that it should not; empty if nothing."""
    dense = synced(model, moe).train().requires_grad_()
    moe.train()
    trained = {id(p) for p in moe.trainable_parameters()}
    before = {k: v.detach().clone() for k, v in moe.state_dict().items()}
    optimizer = torch.optim.SGD(moe.trainable_parameters(), lr=0.01)
    loss = loss_of(moe(**cloned(arguments)))
    if loss is None:
        return ""
    try:
        loss.backward()
    except RuntimeError as error:
        require_gradients(dense, arguments, error)
        raise
    grads = [p.grad for p in moe.trainable_parameters() if p.grad is not None]
    moved = any(bool((g.abs() > 1e-3).any()) for g in grads)
    optimizer.step()
    now = moe.state_dict(keep_vars=True)
    weights = {n for n, t in now.items() if isinstance(t, torch.nn.Parameter)}
    changed = {n for n in weights if not torch.equal(now[n].nan_to_num(), before[n].nan_to_num())}
    moe.zero_grad(set_to_none=True)
    wrong = {n for n in changed if id(now[n]) not in trained}
    if moe.recipe.freeze:
        wrong |= {n for n in changed if not n.startswith("moe_rewrite.")}
    if wrong:
        return f"a step changed {sorted(wrong)}"
    return "a step changed nothing" if moved and not changed else ""
