"""Rewrite dense PyTorch models into mixture-of-experts models, by graph passes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import FFNExperts, LoRAExperts, PatchRouter, RegionExperts, TokenRouter
from .convert import convert, from_standard, inspect, load
from .errors import MoeRewriteError
from .experts.carved import CarvedExperts
from .utils.rare_collections import rare_collections

if TYPE_CHECKING:
    from . import onnx as onnx
    from .converted.model import MoEModel
    from .converted.verify import verify
    from .frontend.tools.experts_backend import register_experts
    from .frontend.tools.trainer_callback import RoutingCallback
    from .onnx import export_onnx

__version__ = "0.1.0"

__all__ = [
    "CarvedExperts",
    "FFNExperts",
    "LoRAExperts",
    "MoEModel",
    "MoeRewriteError",
    "PatchRouter",
    "RegionExperts",
    "RoutingCallback",
    "TokenRouter",
    "convert",
    "export_onnx",
    "from_standard",
    "inspect",
    "load",
    "register_experts",
    "verify",
]

# Imported when first asked for: they import torch, and the callback imports transformers.
_LATER = {
    "MoEModel": "converted.model",
    "RoutingCallback": "frontend.tools.trainer_callback",
    "export_onnx": "onnx",
    "register_experts": "frontend.tools.experts_backend",
    "verify": "converted.verify",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        with rare_collections():
            value = getattr(import_module(f".{_LATER[name]}", __name__), name)
    elif name == "onnx":
        value = import_module(".onnx", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "onnx"})
