"""The options of `export_onnx`, checked against the model before any work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigError
from ..passes.kinds import kind_of
from ..utils.sharded import is_sharded
from .lowerings.choose import LOWERINGS, Choice

if TYPE_CHECKING:
    from ..converted.model import MoEModel

OPSETS = range(20, 24)
CASTS = (torch.float32, torch.float16, torch.bfloat16)
BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class ExportOptions:
    """See `export_onnx`."""

    lowering: str = "auto"
    dtype: torch.dtype | str | None = None
    opset: int = OPSETS[0]
    example_inputs: Any = None
    cache: bool = False
    external_data: bool | None = None
    open_experts: bool = False
    open_inputs: bool = False
    verify: bool = True

    def check(self, moe: MoEModel) -> None:
        """Raises ConfigError if this model cannot be exported with these options."""
        if moe.experts_quantized:
            raise ConfigError(
                f"export_onnx: these experts are in {moe.experts_quantized} by quantize_experts(); export "
                "the model as it was saved before that, with dtype='int8' or 'int4' for quantised "
                "experts in the file"
            )
        self.cast(moe)
        self.choice(moe)
        if self.opset not in OPSETS:
            raise ConfigError(f"opset={self.opset!r}: expected {OPSETS[0]} to {OPSETS[-1]}")
        if any(p.is_meta for p in moe.parameters()):
            raise ConfigError(
                "this model is on the meta device: load its weights before exporting it"
            )
        if any(map(is_sharded, moe.parameters())):
            raise ConfigError(
                "this model is divided over processes: save it (save_pretrained, in all of them), "
                "load it in one process, and export that"
            )

    def cast(self, moe: MoEModel) -> torch.dtype | None:
        """The dtype to cast the model to, or None. Raises ConfigError for an unknown one."""
        name = str(self.dtype).removeprefix("torch.")
        names = [str(c).removeprefix("torch.") for c in CASTS]
        stays = self.dtype is None or name == str(moe.dtype).removeprefix("torch.")
        if stays or self.bits is not None:
            return None
        if name not in names:
            expected = ", ".join([*names, *BITS])
            raise ConfigError(f"dtype={self.dtype!r}: expected None or one of {expected}")
        return getattr(torch, name)

    @property
    def bits(self) -> int | None:
        """Bits of the weights of quantized experts, or None."""
        return BITS.get(str(self.dtype))

    def choice(self, moe: MoEModel) -> Choice:
        """The Choice of each site's lowering. Raises ConfigError for options that do not fit."""
        asked, bits = self.lowering, self.bits
        if asked not in LOWERINGS:
            raise ConfigError(f"lowering={asked!r}: expected {' or '.join(map(repr, LOWERINGS))}")
        experts = moe.recipe.experts
        only, kind = kind_of(experts).onnx, type(experts).__name__
        if only is not None:
            name, words = only
            if asked not in ("auto", name):
                raise ConfigError(
                    f"lowering={asked!r}: {kind} are written as {name!r} ({words}); use that or "
                    "'auto'"
                )
            if bits is not None:
                raise ConfigError(f"dtype='int{bits}': for FFNExperts only, this model has {kind}")
        elif self.open_experts and (asked != "auto" or bits is not None):
            raise ConfigError(
                f"open_experts=True with lowering={asked!r} or int8 or int4: a variable number of "
                "feed-forward experts has one lowering, without quantization; leave both out"
            )
        return Choice(asked, bits, self.open_experts)
