"""The fields of PEFT's adapter_config.json: each is applied, has no effect here, or is refused."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ...errors import CheckpointError

# the adapter's tensors say the same, or the field matters only while the adapter is trained
NO_EFFECT = frozenset(
    ["task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "target_modules", "exclude_modules", "lora_dropout", "fan_in_fan_out", "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size", "runtime_config", "loftq_config", "eva_config", "ensure_weight_tying"]
)  # fmt: skip
APPLIED = frozenset(
    ["r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"]
)
# the others change the base model's weights, so the adapter alone is not what was trained
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
UNSET: tuple[Any, ...] = (None, False, "none", "", [], {})
LITERAL = re.compile(r"[\w.\-]+")


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter's configuration says of ranks and scales.

    rank, alpha: of every module that no pattern names.
    ranks, alphas: by the end of a module's dotted name.
    root: the scale is alpha / sqrt(rank) (rank-stabilised LoRA, arXiv 2312.03732, equation 4), not
        alpha / rank.
    """

    rank: int
    alpha: float
    ranks: dict[str, int]
    alphas: dict[str, float]
    root: bool

    @classmethod
    def of(cls, where: str, config: Any) -> AdapterConfig:
        """Raises CheckpointError for another kind of adapter, and for fields that LoRA experts
        cannot do."""
        kind = config.get("peft_type") if isinstance(config, dict) else config
        if not isinstance(config, dict) or kind != "LORA":
            raise CheckpointError(f"{where}: an adapter of type {kind!r}, expected 'LORA'")
        for name, given in config.items():
            if name not in NO_EFFECT | APPLIED and given not in UNSET:
                raise CheckpointError(
                    f"{where}: {name}={given!r}: LoRA experts cannot do this; merge the adapter into "
                    "its base in PEFT (merge_and_unload), or train one without it"
                )
        start = config.get("init_lora_weights", True)
        if start not in PLAIN_STARTS:
            raise CheckpointError(
                f"{where}: init_lora_weights={start!r} changed the base model's weights, to which "
                "this adapter belongs: save it in PEFT with "
                "save_pretrained(folder, path_initial_model_for_weight_conversion=...)"
            )
        rank: Any = config.get("r")
        alpha: Any = config.get("lora_alpha")
        ranks, alphas = (config.get(f"{n}_pattern") or {} for n in ("rank", "alpha"))
        if not (_is_rank(rank) and _is_number(alpha)):
            raise CheckpointError(
                f"{where}: r={rank!r}, lora_alpha={alpha!r} are no rank and scale"
            )
        for name, pattern, fits in (("rank", ranks, _is_rank), ("alpha", alphas, _is_number)):
            known = isinstance(pattern, dict) and all(map(LITERAL.fullmatch, pattern))
            if not known or not all(map(fits, pattern.values())):
                raise CheckpointError(
                    f"{where}: {name}_pattern={pattern!r}: expected {name}s by plain names of modules"
                )
        return cls(rank, alpha, ranks, alphas, bool(config.get("use_rslora")))

    def rank_of(self, module: str) -> int:
        return _matching(self.ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        """The factor of B A."""
        rank = self.rank_of(module)
        return _matching(self.alphas, module, self.alpha) / (rank**0.5 if self.root else rank)

    @property
    def largest_rank(self) -> int:
        return max([self.rank, *self.ranks.values()])


def _matching(pattern: dict[str, Any], module: str, otherwise: Any) -> Any:
    """As PEFT: the first entry that is the end of a module's name."""
    named = (v for k, v in pattern.items() if module == k or module.endswith(f".{k}"))
    return next(named, otherwise)


def _is_rank(given: Any) -> bool:
    return type(given) is int and given >= 1


def _is_number(given: Any) -> bool:
    return type(given) in (int, float)
