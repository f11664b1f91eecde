"""A model of transformers with experts beside its linear maps, and a gate where the deep layers begin.

This file is written beside the weights and needs torch and transformers only. What is where stands
in the configuration's `moe_rewrite`; the classes of the model are at the end of the file.

Shapes: B batch, S positions, D features at the gate, E experts, r the rank of one.
"""

from __future__ import annotations

import inspect
import re
import threading
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import AutoModel, DynamicCache, PreTrainedModel  # noqa: F401
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

CACHE = {"cache", "past_key_values"}.intersection(BaseModelOutputWithPast.__annotations__).pop()


class Plan(threading.local):
    """What the call that runs in this thread knows. One for a model: its maps read what its gate
    wrote.

    scales: (B, S, E r) gates times alpha / r; (B, 1, E r) where a sequence has one row of gates.
    rows: (B, S).
    mask: (B, S'), nonzero for positions that count, or None.
    cache: the key-value cache, or None. before: the means of the positions in it, or None.
    state: sums (B, S, F) and counts (B, S) after each position of this call.
    """

    scales: torch.Tensor | None = None
    rows: tuple[int, int] = (0, 0)
    mask: torch.Tensor | None = None
    cache: Any = None
    before: RunningMean | None = None
    state: tuple[torch.Tensor, torch.Tensor] | None = None

    def __deepcopy__(self, memo: dict) -> Plan:
        return type(self)()

    def __reduce__(self) -> Any:
        return type(self), ()

    def of(self, x: torch.Tensor, layout: str) -> torch.Tensor:
        """The scales for a map's rows: (B, S, ..., D), (B * S, D) if flat, (B, D) of samples."""
        scales = self.scales
        if scales is None:
            raise RuntimeError("a map with experts ran before the layer at which their gate is")
        if layout == "flat":
            scales = scales.expand(*self.rows, -1).flatten(0, 1)
        elif layout == "samples":
            scales = scales.squeeze(1)
        while scales.ndim < x.ndim:
            scales = scales.unsqueeze(-2)
        return scales.to(x)


class LowRank(nn.Module):
    """The experts of one map, stacked. down: to E r features, up: from these."""

    def __init__(self, inside: int, outside: int, ranks: int) -> None:
        super().__init__()
        self.down = nn.Linear(inside, ranks, bias=False)
        self.up = nn.Linear(ranks, outside, bias=False)

    def forward(self, x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(x) * scales)


class RoutedMap(nn.Module):
    """A linear map and its experts; before the gate without any, so that names are alike in all
    layers. It is no nn.Linear, which engines replace by one of theirs, without its experts."""

    def __init__(self, base: nn.Module, ranks: int, layout: str, plan: Plan) -> None:
        super().__init__()
        self.base, self.layout, self.plan = base, layout, plan
        self.low_rank: LowRank | None = None
        if ranks:
            inside, outside = self.weight.shape  # of transformers' Conv1D
            if isinstance(base, nn.Linear):
                inside, outside = outside, inside
            self.low_rank = LowRank(inside, outside, ranks)

    @property
    def weight(self) -> torch.Tensor:
        """That of the map, for code that reads its dtype."""
        return self.base.weight  # type: ignore[return-value]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.base(x)
        if self.low_rank is None:
            return out
        return out + self.low_rank(x, self.plan.of(x, self.layout))


class Gate(nn.Module):
    """The gates of rows from their features, in float32.

    weight: (1 + E, F) and bias: (1 + E,), the frozen model's row first where it has one, F features
    that are read: D, or M random ones of an analytic gate. lift: (D, M) of these.
    """

    def __init__(self, width: int, experts: int, spec: dict[str, Any]) -> None:
        super().__init__()
        self.spec, projection = spec, spec["projection"]
        rows = experts + int(spec["base"])
        self.weight = nn.Parameter(torch.zeros(rows, projection or width))
        self.bias = nn.Parameter(torch.zeros(rows))
        self.lift = nn.Parameter(torch.zeros(width, projection)) if projection else None

    def forward(self, features: torch.Tensor, plan: Plan) -> torch.Tensor:
        """(B, S, E) or (B, 1, E) of features (B, S, D)."""
        spec, x = self.spec, features.detach().float()
        if spec["normalize"]:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        if self.lift is not None:
            x = (x @ self.lift.float()).relu()
        seen = None
        if spec["granularity"] != "token":
            x, seen = self._mean(x, plan)
        logits = linear(x, self.weight.float(), self.bias.float())
        if seen is not None and spec["prior"]:
            logits = torch.cat([logits[..., :1] + spec["prior"] / seen, logits[..., 1:]], dim=-1)
        gates = self._chosen(logits)
        return gates[..., 1:] if spec["base"] else gates

    def _mean(self, x: torch.Tensor, plan: Plan) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(means over the positions that count, how many these are): (B, 1, F) and None over the
        whole sequence; (B, S, F) and (B, S, 1) up to each position."""
        mask = plan.mask
        counted = x.new_ones(x.shape[:2])
        if mask is not None:
            if mask.ndim != 2 or mask.shape[1] < x.shape[1]:
                raise ValueError(
                    f"attention_mask of shape {tuple(mask.shape)}: a gate that averages positions "
                    f"needs (batch, length) for features {tuple(x.shape)}"
                )
            counted = (mask[:, mask.shape[1] - x.shape[1] :] != 0).to(x)
        x = x.masked_fill(counted.unsqueeze(-1) == 0, 0.0)
        if self.spec["granularity"] == "sequence":
            total = counted.sum(1, keepdim=True).clamp_min(1)
            return x.sum(1, keepdim=True) / total.unsqueeze(-1), None
        sums, counts = x.cumsum(1), counted.cumsum(1)
        if plan.before is not None:
            total, count = plan.before.total, plan.before.count
            sums, counts = sums + total.unsqueeze(1), counts + count.unsqueeze(1)
        plan.state = sums, counts
        counts = counts.clamp_min(1).unsqueeze(-1)
        return sums / counts, counts

    def _chosen(self, logits: torch.Tensor) -> torch.Tensor:
        """The softmax over the top k, or over all, with zero for the others. Of equal logits the
        first are taken."""
        k = min(self.spec["top_k"] or logits.shape[-1], logits.shape[-1])
        if k == logits.shape[-1]:
            return logits.softmax(-1)
        taken = logits.sort(dim=-1, descending=True, stable=True).indices[..., :k]
        if self.spec["over_all"]:
            gates = logits.softmax(-1).gather(-1, taken)
        else:
            gates = logits.gather(-1, taken).softmax(-1)
        return torch.zeros_like(logits).scatter(-1, taken, gates)


class RunningMean(CacheLayerMixin):
    """The sum of the features so far and how many they are, as one more layer of the key-value cache:
    so it is reordered and repeated together with the keys. total: (B, F), count: (B,).
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.total, self.count, self.length = torch.empty(0), torch.empty(0), 0

    @staticmethod
    def of(cache: Any) -> RunningMean | None:
        """That of a cache; None in an empty one. Raises ValueError where there can be none."""
        if cache is None:
            return None
        if not isinstance(cache, DynamicCache):
            raise ValueError(
                f"{CACHE}={type(cache).__name__}: a gate that reads the prefix keeps its mean in a "
                "DynamicCache: leave cache_implementation at its default"
            )
        found = next((la for la in cache.layers if isinstance(la, RunningMean)), None)
        if found is None and cache.get_seq_length() > 0:
            raise ValueError("this cache was filled without the gate: start from an empty one")
        return found

    def store(self, sums: torch.Tensor, counts: torch.Tensor) -> None:
        """Sums and counts after each position of a call."""
        self.total, self.count = sums[:, -1].clone(), counts[:, -1].clone()
        self.length, self.is_initialized = self.length + sums.shape[1], True

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("the gate's mean holds no keys")

    lazy_initialization = update

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in older versions

    def offload(self) -> None: ...

    prefetch = offload

    def _select(self, select: Any) -> None:
        self.total, self.count = select(self.total), select(self.count)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._select(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(lambda t: t[indices])

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError("a gate's mean cannot be taken back: generate without an assistant")


def kind_of(name: str) -> str:
    """A module's name without the numbers of layers, as plans of parallelism have it."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def wrap(model: nn.Module, sites: dict[str, str], ranks: int, plan: Plan) -> None:
    """Put the experts' modules where the maps were. sites: name -> layout of its rows."""
    kinds = {kind_of(name) for name in sites}
    for name in [n for n, _ in model.named_modules()]:
        if kind_of(name) in kinds:
            parent, _, child = name.rpartition(".")
            here = ranks if name in sites else 0
            made = RoutedMap(model.get_submodule(name), here, sites.get(name, ""), plan)
            setattr(model.get_submodule(parent), child, made)


def with_experts(plan: dict[str, str], sites: dict[str, str]) -> dict[str, str]:
    """A plan of tensor parallelism, in which maps with experts have three parts: the experts' first
    product is divided as the inputs of the map are, their second one as its outputs."""
    kinds = {kind_of(name) for name in sites}
    own: dict[str, str] = {}
    for name in [n for n in plan if n in kinds]:
        style = plan.pop(name)
        part = "down" if "rowwise" in style else "up"
        own |= {f"{name}.base": style, f"{name}.low_rank.{part}": style}
    return own | plan


class RoutedModel(PreTrainedModel):
    """Comes before the class of the base model among the bases of a class."""

    plan: Plan
    supports_gradient_checkpointing = False  # a recomputed layer would find the latest call's gates

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.install()

    def install(self) -> None:
        """Put gate and experts into a model that was made without them."""
        facts = self.config.moe_rewrite
        self.plan = Plan()
        experts = len(facts["experts"])
        wrap(self, facts["sites"], experts * facts["rank"], self.plan)
        self.gate_of_experts = Gate(facts["width"], experts, facts["gate"])
        place = self.get_submodule(facts["place"])
        place.register_forward_pre_hook(self._route, with_kwargs=True)
        if facts["gate"]["granularity"] != "token":
            whole = self.get_submodule(facts["whole"])
            whole.register_forward_pre_hook(self._begin, with_kwargs=True)
            whole.register_forward_hook(self._end)
        wide = {*(self._keep_in_fp32_modules_strict or ()), "gate_of_experts"}
        self._keep_in_fp32_modules_strict = wide
        self.post_init()
        self._tp_plan, self._pp_plan = with_experts(self._tp_plan or {}, facts["sites"]), {}

    def _route(self, module: nn.Module, given: tuple, kwargs: dict[str, Any]) -> None:
        """Before the first deep layer: make the gates."""
        facts = self.config.moe_rewrite
        features = given[0] if given else kwargs[facts["argument"]]
        if facts["gate"]["granularity"] != "token" and self.config._attn_implementation == "vllm":
            raise ValueError(
                "this gate averages the positions of a sequence, and vLLM runs several sequences as "
                "one: convert with TokenRouter(granularity='token') to serve there"
            )
        gates = self.gate_of_experts(features, self.plan)
        scales = (gates * facts["scale"]).repeat_interleave(facts["rank"], dim=-1)
        self.plan.scales, self.plan.rows = scales.to(features.dtype), features.shape[:2]

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before the run of all layers: keep what the gate needs to know."""
        takes = inspect.signature(type(module).forward)
        given = takes.bind_partial(module, *args, **kwargs).arguments
        given = given | given.get("kwargs", {})
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        self.plan.mask, self.plan.cache, self.plan.state = mask, given.get(CACHE), None
        if self.gate_of_experts.spec["granularity"] == "prefix":
            self.plan.before = RunningMean.of(self.plan.cache)
        alone = mask is None and self.plan.cache is None and positions is not None
        if alone and bool((positions.diff(dim=-1) != 1).any()):
            raise ValueError(
                "position_ids of several documents in a sample: pass them as samples of their own"
            )

    def _end(self, module: nn.Module, args: tuple, output: Any) -> None:
        """After it: keep the gate's mean in the cache."""
        plan, state = self.plan, self.plan.state
        cache = plan.cache if plan.cache is not None else getattr(output, CACHE, None)
        if cache is not None and state is not None:
            if plan.before is None:
                plan.before = RunningMean()
                cache.layers.append(plan.before)
            plan.before.store(*state)
        plan.mask = plan.cache = plan.before = plan.state = None


class RoutedHead(PreTrainedModel):
    """Comes before the class of a model with a head. routed: the class of its base model."""

    routed: type[RoutedModel]
    supports_gradient_checkpointing = False

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        base: Any = self.base_model
        if not isinstance(base, RoutedModel):  # the class of the head names that of the dense base
            base.__class__ = self.routed
            base.install()
        facts = config.moe_rewrite
        wrap(self, facts["sites_of_head"], len(facts["experts"]) * facts["rank"], base.plan)
        self.post_init()
        self._tp_plan, self._pp_plan = with_experts(self._tp_plan or {}, facts["sites_of_head"]), {}
