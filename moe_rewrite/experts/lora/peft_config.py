"""The fields of PEFT's adapter_config.json: each is applied, has no effect here, or is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...errors import CheckpointError
from ...utils.read_files import shown

# the adapter's tensors say the same, or the field matters only while the adapter is trained
NO_EFFECT = frozenset(
    ["task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "target_modules", "exclude_modules", "lora_dropout", "fan_in_fan_out", "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"]
    + ["loftq_config", "eva_config", "corda_config", "lora_ga_config"]  # of values of init_lora_weights
)  # fmt: skip
APPLIED = frozenset(
    ["r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"]
)
# PEFT's initialisations that leave the base model's weights as they are
PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")
# those that change them, and whose adapters PEFT can convert to ones of the original weights
CONVERTIBLE = ("pissa", "olora", "corda", "lora_ga")
PLAIN_NAME = re.compile(r"\^?[\w.\-]+\$?")  # PEFT takes regular expressions


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
            raise CheckpointError(f"{where}: an adapter of type {shown(kind)}, expected 'LORA'")
        for name, given in config.items():
            if name not in NO_EFFECT | APPLIED and not _is_unset(name, given):
                raise CheckpointError(
                    f"{where}: {name}={shown(given)}: LoRA experts cannot do this; merge the adapter "
                    "into its base in PEFT (merge_and_unload), or train one without it"
                )
        _require_plain_start(where, config.get("init_lora_weights"))

        def field(name: str, unset: Any, expected: str, fits: Callable[[Any], bool]) -> Any:
            given = unset if config.get(name) is None else config[name]
            if not fits(given):
                raise CheckpointError(f"{where}: {name}={shown(given)}: expected {expected}")
            return given

        return cls(
            rank=field("r", None, "an int >= 1", _is_rank),
            alpha=field("lora_alpha", None, "a number below 1e30", _is_number),
            ranks=field("rank_pattern", {}, "ranks by plain names of modules", _each(_is_rank)),
            alphas=field(
                "alpha_pattern", {}, "numbers by plain names of modules", _each(_is_number)
            ),
            root=field("use_rslora", False, "true or false", lambda given: type(given) is bool),
        )

    def rank_of(self, module: str) -> int:
        return _matching(self.ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        """The factor of B A."""
        rank = self.rank_of(module)
        return _matching(self.alphas, module, self.alpha) / (rank**0.5 if self.root else rank)

    @property
    def largest_rank(self) -> int:
        return max([self.rank, *self.ranks.values()])


def _is_unset(name: str, given: Any) -> bool:
    """0 is not: it may be an index."""
    nothing = given is None or given is False or given in ("", [], {})
    return nothing or (name == "bias" and given == "none")


def _require_plain_start(where: str, start: Any) -> None:
    if start is None or isinstance(start, bool):
        return
    name = start.lower() if isinstance(start, str) else ""
    if name in PLAIN_STARTS:
        return
    way = "merge the adapter into its base in PEFT (merge_and_unload)"
    if name.startswith(CONVERTIBLE):
        way = (
            "save it in PEFT with "
            "save_pretrained(folder, path_initial_model_for_weight_conversion=...)"
        )
    raise CheckpointError(
        f"{where}: init_lora_weights={shown(start)}: the adapter belongs to base weights that its "
        f"initialisation changed, not to the original ones: {way}"
    )


def _matching(pattern: dict[str, Any], module: str, otherwise: Any) -> Any:
    """As PEFT: the first entry that matches the end of a module's name."""
    named = (v for k, v in pattern.items() if re.match(rf"(.*\.)?({k})$", module))
    return next(named, otherwise)


def _is_rank(given: Any) -> bool:
    return type(given) is int and 1 <= given <= 2**31


def _is_number(given: Any) -> bool:
    return type(given) in (int, float) and abs(given) < 1e30


def _each(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether a value is a pattern: a dict of such values by names."""
    return lambda pattern: (
        isinstance(pattern, dict)
        and all(PLAIN_NAME.fullmatch(name) and fits(value) for name, value in pattern.items())
    )
