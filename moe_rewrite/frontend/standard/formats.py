"""Which of transformers' mixture-of-experts classes can hold a model, and its configuration there.

What a class has is read from its configuration and from the names of its tensors, on the meta
device; nothing is computed here.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig

from . import names

FORMATS = ("mixtral", "qwen3_moe", "qwen2_moe", "glm4_moe", "olmoe")  # "auto" tries them in turn
BASES = ("llama", "mistral", "qwen2", "qwen3", "glm")
SIGMOID = ("glm4_moe",)  # the others' routers take a softmax
SHARED = 64  # width of a shared expert that adds nothing, where a class cannot do without
FLAGS = ("qkv_bias", "attention_bias", "use_qk_norm")  # of classes: which tensors there are
BY_TENSORS = {*FLAGS, "mlp_bias"}  # of bases: the tensors that they lead to are compared
BY_WINDOW = {"use_sliding_window", "max_window_layers", "layer_types", "sliding_window"}
NO_MATTER = {
    "architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "_name_or_path",
    "pretraining_tp", "use_cache",
}  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """What a class has to hold.

    config: the dense model's.
    dense: its tensors outside of the experts' regions, by name.
    regions: dotted name of each region that experts replaced.
    interleaved: its rotary embedding turns neighbours, not halves.
    experts, top_k, normalized, score, hidden: of every region; see `GateRule`; width inside. score
        ``"any"``: of one expert a row, whose gate is 1.
    shared: experts of this width that every row has, as one.
    shared_gate: whether a row has them times the sigmoid of a linear map of it.
    """

    config: PretrainedConfig
    dense: Mapping[str, torch.Tensor]
    regions: tuple[str, ...]
    interleaved: bool
    experts: int
    top_k: int
    normalized: bool
    score: str
    hidden: int
    shared: int = 0
    shared_gate: bool = False


@dataclass
class Fit:
    """A class's model on the meta device, and why it does not hold what is wanted; empty if it does."""

    format: str
    model: nn.Module
    refusals: list[str] = field(default_factory=list)


def fit(wanted: Wanted, format: str) -> Fit:
    """The class's model for these sizes, with reasons where it is another function."""
    kind = CONFIG_MAPPING[format]
    blank = kind()
    refusals = _options_without_place(wanted.config, blank)
    given = _shared(wanted.config, blank) | _of_experts(wanted, format, blank, refusals)
    layers, refused = _of_layers(wanted, blank)
    given |= layers
    refusals += refused
    beside = names.beside(wanted.regions, wanted.config.num_hidden_layers) if refused else ()
    flags = [f for f in FLAGS if hasattr(blank, f)]
    fits = []
    for chosen in itertools.product((False, True), repeat=len(flags)):
        config = kind(**(given | dict(zip(flags, chosen, strict=True))))
        model = meta_model(config)
        fits.append(Fit(format, model, refusals + _tensors_without_place(wanted, model, beside)))
    best = min(fits, key=lambda f: len(f.refusals))
    best.refusals += _other_values(wanted.config, best.model.config)  # type: ignore[arg-type]
    return best


def meta_model(config: PretrainedConfig) -> nn.Module:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_config(config)


def _shared(config: PretrainedConfig, blank: PretrainedConfig) -> dict[str, Any]:
    """The options that both classes have, and those of attention windows and positions."""
    both = config.to_dict().keys() & blank.to_dict().keys()
    given = {n: getattr(config, n) for n in both - NO_MATTER - BY_WINDOW - set(FLAGS)}
    given["head_dim"] = head_dim(config)
    partial = "partial_rotary_factor" in (blank.rope_parameters or {})
    given["rope_parameters"] = rope(config) if partial else dict(config.rope_parameters)  # type: ignore[arg-type]
    windows = windows_of(config)
    if any(windows) and hasattr(blank, "sliding_window"):
        given["sliding_window"] = max(w for w in windows if w)
        given |= {"use_sliding_window": True} if hasattr(blank, "use_sliding_window") else {}
    if getattr(blank, "layer_types", None) is not None:
        kinds = ("full_attention", "sliding_attention")
        given["layer_types"] = [kinds[w is not None] for w in windows]
    return given


def _of_experts(
    wanted: Wanted, format: str, blank: PretrainedConfig, refusals: list[str]
) -> dict[str, Any]:
    """The options of experts and their routers."""
    count = next(n for n in ("num_local_experts", "num_experts") if hasattr(blank, n))
    given: dict[str, Any] = {count: wanted.experts, "num_experts_per_tok": wanted.top_k}
    width = "moe_intermediate_size"
    given[width if hasattr(blank, width) else "intermediate_size"] = wanted.hidden
    if hasattr(blank, "norm_topk_prob"):
        given["norm_topk_prob"] = wanted.normalized
    elif not wanted.normalized:
        refusals.append("its gates always sum to one, these (gate='all') do not")
    score = "sigmoid" if format in SIGMOID else "softmax"
    if wanted.score not in ("any", score):
        refusals.append(f"its routers take a {score}, these a {wanted.score}")
    if hasattr(blank, "shared_expert_intermediate_size"):
        together = wanted.shared * wanted.hidden or min(SHARED, wanted.hidden)
        given["shared_expert_intermediate_size"] = together
    elif hasattr(blank, "n_shared_experts"):
        given["n_shared_experts"] = wanted.shared or 1
        if wanted.shared_gate:
            refusals.append("its shared expert has no gate, here it has one (shared='sigmoid')")
    elif wanted.shared:
        refusals.append("it has no shared expert")
    if hasattr(blank, "num_mtp_layers"):
        given["num_mtp_layers"] = 0
    return given


def _of_layers(wanted: Wanted, blank: PretrainedConfig) -> tuple[dict[str, Any], list[str]]:
    """The options that say which layers have experts; refusals."""
    layers = range(wanted.config.num_hidden_layers)
    dense = sorted(set(layers) - {names.layer_of(r) for r in wanted.regions})
    if hasattr(blank, "mlp_only_layers"):
        return {"mlp_only_layers": dense, "decoder_sparse_step": 1}, []
    if hasattr(blank, "first_k_dense_replace"):
        said = f"only its first layers can be dense, here layers {dense} are"
        fits = dense == list(range(len(dense)))
        return {"first_k_dense_replace": len(dense)}, [] if fits else [said]
    return {}, [f"all its layers have experts, here layers {dense} are dense"] if dense else []


def _options_without_place(config: PretrainedConfig, blank: PretrainedConfig) -> list[str]:
    """Options of the base that its class's defaults do not have and this class does not know."""
    known = blank.to_dict().keys() | NO_MATTER | BY_WINDOW | BY_TENSORS | {"head_dim"}
    usual = type(config)().to_dict()
    odd = {k: v for k, v in config.to_dict().items() if k not in known and v != usual.get(k)}
    found = [f"it has no option {name}={value!r}" for name, value in odd.items()]
    partial = rope(config)["partial_rotary_factor"]
    if partial != 1.0 and "partial_rotary_factor" not in (blank.rope_parameters or {}):
        found.append(f"it has no partial_rotary_factor={partial}")
    return found


def _other_values(config: PretrainedConfig, made: PretrainedConfig) -> list[str]:
    """Options that this class changed or cannot have."""
    before, after = windows_of(config), windows_of(made)
    if before != after:
        return [f"its attention windows by layer would be {after}, expected {before}"]
    return []


def _tensors_without_place(
    wanted: Wanted, model: nn.Module, beside: tuple[str, ...]
) -> list[str]:  # fmt: skip
    """Tensors of the base that the class has no place for, and tensors that it needs in addition.

    beside: regions that are not compared.
    """
    there = {k: t.shape for k, t in model.state_dict().items()}
    inside = tuple(f"{region}." for region in (*wanted.regions, *beside))
    needed = {k: s for k, s in there.items() if not k.startswith(inside)}
    known = {k: t.shape for k, t in wanted.dense.items() if not k.startswith(inside)}
    used = {name for k in needed for name in names.sources(k, known)}
    lost = [k for k in known if k not in used]
    absent = [k for k in needed if not names.sources(k, known)]
    odd = [k for k in needed if known.get(k, needed[k]) != needed[k]]
    said = [f"it has no {name}" for name in names.by_kind(lost)]
    said += [f"it needs {name}, which this model has not" for name in names.by_kind(absent)]
    return said + [f"its {name} has another shape" for name in names.by_kind(odd)]


def windows_of(config: PretrainedConfig) -> list[int | None]:
    """The attention window of each layer; None for none."""
    window = getattr(config, "sliding_window", None) or None
    kinds = getattr(config, "layer_types", None)
    layers = range(config.num_hidden_layers)
    return [window if kinds is None or kinds[i] == "sliding_attention" else None for i in layers]


def head_dim(config: PretrainedConfig) -> int:
    of = getattr(config, "head_dim", None)
    return int(of or config.hidden_size // config.num_attention_heads)


def rope(config: PretrainedConfig) -> dict[str, Any]:
    """The parameters of rotary embeddings, with the share of a head that they turn."""
    return {"partial_rotary_factor": 1.0} | dict(config.rope_parameters)
