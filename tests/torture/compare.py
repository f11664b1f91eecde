"""Comparisons of outputs, states and attributes, that say what differs."""

import copy

import torch
from torch.utils import _pytree as pytree

TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-4, torch.float16: 3e-2, torch.bfloat16: 8e-2}
LOW = (torch.float16, torch.bfloat16)


def cloned(arguments):
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def lowest(model):
    """The tolerance of the model's least exact part."""
    dtypes = {p.dtype for p in model.parameters()} | {torch.float32}
    return max(TOLERANCE.get(d, 0.0) for d in dtypes)


def leaves(outputs):
    if hasattr(outputs, "__dataclass_fields__"):
        outputs = dict(vars(outputs))
    return pytree.tree_leaves(outputs)


def differing(want, ours, tolerance, exact=False, floats_only=False):
    """What differs between two outputs; empty if nothing does."""
    if type(want) is not type(ours):
        return f"output of type {type(ours).__name__}, not {type(want).__name__}"
    want, ours = leaves(want), leaves(ours)
    if len(want) != len(ours):
        return f"{len(ours)} outputs, not {len(want)}"
    for i, (a, b) in enumerate(zip(want, ours, strict=True)):
        if not isinstance(a, torch.Tensor):
            if type(a) is not type(b) or a != b:
                return f"output {i} is {b!r}, not {a!r}"
            continue
        if not isinstance(b, torch.Tensor):
            return f"output {i} is a {type(b).__name__}, not a tensor"
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"output {i} is {b.dtype} {tuple(b.shape)}, not {a.dtype} {tuple(a.shape)}"
        if not (a.is_floating_point() or a.is_complex()) and floats_only:
            continue
        eps = torch.finfo(a.dtype).eps if a.is_floating_point() or a.is_complex() else 0.0
        if error := far(a.detach(), b.detach(), max(tolerance, eps), exact):
            return f"output {i} {error}"
    return ""


def far(a, b, tolerance, exact=False):
    """By how much two tensors differ, in words; empty if within the tolerance."""
    if torch.equal(a, b) or (a.numel() == 0 and b.numel() == 0):
        return ""
    if a.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    error = (a - b).abs().masked_fill(same, 0.0).nan_to_num(nan=float("inf"))
    finite = a.masked_fill(~a.isfinite(), 0.0).abs().max().item()
    relative = error.max().item() / max(1.0, finite)
    if relative <= (0.0 if exact else tolerance):
        return ""
    return f"differs by {relative:.1e} of {finite:.1e}"


class Snapshot:
    """All that can be told of a model from outside: tensors, attributes, modes, hooks, gradients."""

    def __init__(self, model):
        self.tensors = {n: (t, copy.copy(t.detach()).clone()) for n, t in named(model)}
        self.attributes = attributes(model)

    def changed(self, model):
        """What changed since, in words; empty if nothing did."""
        now = dict(named(model))
        if now.keys() != self.tensors.keys():
            return f"tensors {now.keys() ^ self.tensors.keys()}"
        for name, (tensor, value) in self.tensors.items():
            if now[name] is not tensor:
                return f"{name} is another tensor"
            if tensor.grad is not None:
                return f"{name} has a gradient"
            if not torch.equal(tensor.nan_to_num(), value.nan_to_num()):
                return f"{name} has another value"
        after = attributes(model)
        odd = {
            k
            for k in after.keys() | self.attributes.keys()
            if after.get(k) != self.attributes.get(k)
        }
        return f"attributes {sorted(odd)}" if odd else ""


def named(model):
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not torch.nn.parameter.is_lazy(tensor):
            yield name, tensor


def attributes(model):
    found = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, (int, float, str, bool, type(None))):
                found[name, key] = value
            elif isinstance(value, torch.Tensor):
                found[name, key] = id(value)
            elif key.endswith("_hooks"):
                found[name, key] = tuple(value)
        found[name, "tensors"] = tuple(
            (n, p.requires_grad) for n, p in module._parameters.items() if p is not None
        )
    return found
