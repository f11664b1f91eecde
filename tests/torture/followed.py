"""One run of the dense model in which experts are added or put in the place of modules."""

from contextlib import ExitStack
from math import prod

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from .blocks import Block, Ffn
from .heads import Head
from .reference import (
    CONVOLUTIONS,
    EXPERTS,
    MOVED,
    PRODUCTS,
    TRANSPOSED,
    Counted,
    NotFollowed,
    Patches,
    laid_out,
    token_gates,
)


class Followed:
    """Call it with arguments for the outputs with experts.

    model: a copy of the dense one. state: the added tensors by public name. sites: name of a site ->
    name of its weight, or the names of its parts if it is a copy. cut: see `where_cut`.
    router, experts: the configurations. active: numbers of the experts. sides: of the patch tokens.
    """

    def __init__(self, model, state, sites, cut, router, experts, active, sides=None):
        self.model, self.state, self.sides = model, state, sides
        self.cut, self.moved, _ = cut
        self.router, self.experts, self.active = router, experts, active
        self.patched = router.policy == "patch"
        self.by_layer = getattr(experts, "by_layer", False)
        self.frozen = all(not p.requires_grad for p in model.parameters())
        self.given = None  # gates of a router that the reference does not compute
        self.modules, self.weights = {}, {}
        self.layouts, self.hit, self.alive = {}, set(), []
        for name, weight in sites.items():
            self.layouts[name] = layout_of(model, name)
            if not isinstance(weight, str):
                self.modules[self._whole(weight)] = name
            elif (parameter := plain_weight(model, name, weight)) is not None:
                self.weights[id(parameter)] = name
            else:
                self.modules[name] = name
        self.names = set(sites)

    def __call__(self, arguments):
        self.gates, self.inside, self.deep = None, False, {}
        mask = arguments.get("attention_mask")

        def seen(number, func, args, kwargs, output):
            if number == self.cut:
                self._gate(output, mask)
                return output
            return self._routed(func, args, kwargs, output)

        if self.cut == 0:
            self._gate(arguments["x"], mask)
        with ExitStack() as hooks, Counted(seen):
            for path, name in self.modules.items():
                module = self.model.get_submodule(path)
                before = module.register_forward_pre_hook(self._starts(path))
                after = module.register_forward_hook(self._hook(path, name))
                hooks.callback(before.remove)
                hooks.callback(after.remove)
            out = self.model(**arguments)
        if missing := self.names - self.hit:
            raise NotFollowed(f"never ran as a module or product: {sorted(missing)}")
        return out

    @torch.enable_grad()  # the cut may be inside a function that runs without, or under autocast
    @torch.autocast("cpu", enabled=False)
    def _gate(self, features, mask):
        features = MOVED[self.moved](features).clone()
        if not self.patched or self.frozen:
            features = features.detach()
        self.lead = features.shape[:2] if features.ndim == 3 else features.shape[:1]
        if self.given is not None:
            self.gates = self.given
        elif self.by_layer:
            self.gates = None, 0.0  # each copy's module has its own
        elif self.patched:
            self.gates = Patches(features, self.state, self.router, self.sides), 0.0
        else:
            self.gates = token_gates(features, mask, self.state, self.router, self.active)

    def _routed(self, func, args, kwargs, output):
        if func is torch.Tensor.t and id(args[0]) in self.weights:
            self.weights[id(output)] = self.weights[id(args[0])]
            self.alive.append(output)  # its id must stay its own
        if func is torch.functional.einsum:  # of rows and a weight, with the equation first
            args = args[1:]
        of_site = func in PRODUCTS + CONVOLUTIONS + TRANSPOSED and len(args) > 1
        if self.gates is None or not of_site:
            return output
        name = self.weights.get(id(args[1]))
        return output if name is None else self.beside(name, func, args, output)

    def beside(self, name, func, args, output):
        """The output of a site with its LoRA experts."""
        self.hit.add(name)
        convolved = func in CONVOLUTIONS + TRANSPOSED
        gates = self.over(name, output, convolved)
        for i, e in enumerate(self.active):
            a, b = (self.state[f"{EXPERTS}{name}.{part}.{e}"].to(output.dtype) for part in "ab")
            if convolved:
                delta = low_rank(func, args, a, b)
                gate = gates[:, i : i + 1]
            elif a.ndim == 3:  # one matrix for each of the weight's
                delta = torch.einsum("...d,rdk,erk->...ke", args[0], a, b)
                gate = gates[..., i : i + 1]
            else:
                delta = F.linear(F.linear(args[0], a), b)
                gate = gates[..., i : i + 1]
            output = output + (gate * self.experts.scale * delta).to(output.dtype)
        return output

    def over(self, name, output, convolved=False):
        """The gates over the rows (..., E) or the positions (B, E, ...) of an output."""
        gates, layout = self.gates[0], self.layouts[name]
        if isinstance(gates, Patches):
            return patch_gates(gates, output, convolved, layout)
        if not convolved:
            return laid_out(gates, output, layout, self.lead)
        gates = gates.squeeze(1) if gates.ndim == 3 and gates.shape[1] == 1 else gates
        if gates.ndim == 3 and output.ndim == 3:
            assert gates.shape[1] == output.shape[2], "a site over other positions than the plan's"
            return gates.transpose(1, 2)
        assert gates.ndim == 2, "a convolution over positions has experts by position"
        return gates.reshape(*gates.shape, *(1 for _ in output.shape[2:]))

    def _starts(self, path):
        def hook(module, args):
            if not self.inside:
                self.deep[path] = self.gates is not None  # not so if the cut is its own output

        return hook

    def _hook(self, path, name):
        def hook(module, args, output):
            if self.inside or not self.deep[path]:
                return output
            if isinstance(module, nn.Linear):
                return self.beside(name, F.linear, args, output)
            if isinstance(module, nn.modules.conv._ConvNd):
                if module.padding_mode != "zeros" or module.transposed:
                    raise NotFollowed("a convolution with computed weights")
                geometry = module.stride, module.padding, module.dilation
                func = CONVOLUTIONS[len(module.kernel_size) - 1]
                return self.beside(name, func, (*args, None, None, *geometry), output)
            return self.instead(name, path, module, args, output)

        return hook

    def instead(self, name, path, module, args, output):
        """The sum of the copies' outputs by their gates."""
        of_map = not isinstance(module, Ffn)
        if of_map and name in self.hit:
            raise NotFollowed("a region in which a module runs twice")
        self.hit.add(name)
        if self.by_layer and of_map:
            raise NotFollowed("a layer's router over a map")
        routes = self._of_layer if self.by_layer else self.over
        gates, base = routes(name, args[0] if self.by_layer else output, of_map), self.gates[1]
        total = torch.zeros_like(output)
        if isinstance(base, torch.Tensor):
            total = laid_out(base, output, self.layouts[name], self.lead).to(output.dtype) * output
        for i, e in enumerate(self.active):
            self.inside = True  # the hook is on the copy too
            own = functional_call(module, self._copies(name, path, e), args)
            self.inside = False
            gate = gates[:, i : i + 1] if of_map else gates[..., i : i + 1]
            total = total + gate.to(output.dtype) * own
        return total

    def _of_layer(self, name, x, of_map):
        """Gates that the region's own rows give its input."""
        rows = torch.stack([self.state[f"{EXPERTS}{name}.rows.{e}"] for e in self.active])
        rows = rows.to(self.model.get_submodule(self._path(name)).down.weight.dtype)
        sigmoid = self.experts.score == "sigmoid"
        x = x.float() if sigmoid and x.dtype != torch.float64 else x
        logits = x @ rows.to(x.dtype).T
        logits = logits if logits.dtype == torch.float64 else logits.float()
        scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
        k = min(self.router.top_k or len(self.active), len(self.active))
        best = logits.sort(dim=-1, descending=True, stable=True).indices[
            ..., :k
        ]  # a row of zeros ties
        chosen = torch.zeros_like(scores).scatter(-1, best, 1.0)
        scores = scores * chosen
        if self.router.gate == "selected":
            return scores / scores.sum(-1, keepdim=True)
        return scores

    def _path(self, name):
        return next(path for path, site in self.modules.items() if site == name)

    def _copies(self, name, path, expert):
        prefix, found = f"{EXPERTS}{name}.copies.{path}.", {}
        own = dict(self.model.get_submodule(path).named_parameters())
        for key, tensor in self.state.items():
            if key.startswith(prefix) and key.endswith(f".{expert}"):
                part = key.removeprefix(prefix).rpartition(".")[0]
                found[part] = tensor.to(own[part].dtype) if part in own else tensor
        return found

    def _whole(self, parts):
        """The module that a copy is of."""
        paths = {part.rpartition(".")[0] for part in parts}
        for path, module in self.model.named_modules():
            inside = all(p == path or p.startswith(path + ".") for p in paths)
            if isinstance(module, Ffn) and inside:
                return path
        region = getattr(self.experts, "region", None)
        plain = region and self.experts.halo and self.experts.width == 1
        if plain and self.experts.combine == "sum":
            return region
        raise NotFollowed("copies of what is no module")


def low_rank(func, args, a, b):
    """B A x with the geometry of a convolution's call, over all its input channels."""
    plain = CONVOLUTIONS[args[0].ndim - 3]
    if func in TRANSPOSED:
        given = dict(
            zip(
                ("stride", "padding", "output_padding", "groups", "dilation"),
                args[3:],
                strict=False,
            )
        )
        given["groups"] = 1
        return plain(func(args[0], a.transpose(0, 1), None, **given), b)
    given = dict(zip(("stride", "padding", "dilation"), args[3:], strict=False))
    return plain(func(args[0], a, None, **given), b)


def patch_gates(gates, output, convolved, layout):
    if layout != "rows":
        raise NotFollowed("rows of a form that the reference does not know")
    if convolved:
        return gates.over_map(*output.shape[2:])
    if output.ndim == 3 and gates.sides is None:
        raise NotFollowed("rows of a map")
    if gates.sides is not None and output.shape[1] == gates.prefix.shape[1] + prod(gates.sides):
        over = gates.over_tokens()  # whose products may have a dimension more, of weights
        return over.reshape(*over.shape[:2], *(1 for _ in output.shape[3:]), over.shape[2])
    return gates.over_map(*output.shape[1:3]).permute(0, 2, 3, 1)


def plain_weight(model, name, weight):
    """The parameter that products at this site read, or None if a module computes its weight."""
    modules = dict(model.named_modules(remove_duplicate=False))
    module = modules.get(name)
    if module is not None and "weight" in module._parameters:
        return module.weight
    owner = modules[weight.rpartition(".")[0]] if weight.rpartition(".")[0] else model
    if "parametrizations" in weight or weight.endswith(("_orig", "_v", "_g")):
        return None
    return owner._parameters.get(weight.rpartition(".")[2])


def layout_of(model, name):
    """How a site's rows relate to the plan's, as its block or head says."""
    parts, modules = name.split("."), dict(model.named_modules(remove_duplicate=False))
    for at in range(len(parts)):
        module = modules.get(".".join(parts[:at]))
        if isinstance(module, Block) and parts[at] in module.layouts:
            return module.layouts[parts[at]]
        if isinstance(module, Head):
            return "rows" if module.how in ("each", "tied") else "sample"
    return "rows"
