"""Rewrite dense PyTorch models into mixture-of-experts models, by graph passes."""

from typing import Any

from .config import FFNExperts, LoRAExperts, PatchRouter, RegionExperts, TokenRouter
from .convert import convert, from_standard, inspect, load
from .converted.model import MoEModel
from .converted.verify import verify
from .errors import MoeRewriteError
from .onnx import export_onnx

__version__ = "0.1.0"

__all__ = [
    "FFNExperts",
    "LoRAExperts",
    "MoEModel",
    "MoeRewriteError",
    "PatchRouter",
    "RegionExperts",
    "TokenRouter",
    "convert",
    "export_onnx",
    "from_standard",
    "inspect",
    "load",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "RoutingCallback":  # imports transformers
        from .frontend.trainer_callback import RoutingCallback

        return RoutingCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
