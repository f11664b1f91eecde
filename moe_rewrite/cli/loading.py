"""Parse models, splits and numbers of the command line."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import TokenRouter
from ..errors import ConfigError, require_package
from ..passes.recipe import BY_LAYER


def load_model(spec: str) -> nn.Module:
    """The model of a local Hugging Face folder, `package.module:factory` or hub name, in eval mode.

    Only safetensors are read, and no remote code runs. Raises ConfigError with the reason.
    """
    if ":" in spec and not Path(spec).exists():
        return _from_factory(spec).eval()
    require_package("transformers", "hf", f"model {spec!r}")
    import transformers
    from safetensors import SafetensorError

    try:
        config = transformers.AutoConfig.from_pretrained(spec, trust_remote_code=False)
        name = (config.architectures or ["AutoModel"])[0]
        kind = getattr(transformers, name, transformers.AutoModel)
        return kind.from_pretrained(spec, use_safetensors=True).eval()
    except (OSError, ValueError, SafetensorError) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"model {spec!r}: expected a Hugging Face folder, a hub name or package.module:factory "
            f"({line})"
        ) from None


def _from_factory(spec: str) -> nn.Module:
    module, _, factory = spec.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        model = getattr(importlib.import_module(module), factory)()
    except (ImportError, AttributeError, TypeError) as error:
        raise ConfigError(f"model {spec!r}: {error}") from None
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model {spec!r} gives a {type(model).__name__}: expected a Module")
    return model


def token_router(mode: str, router: str, asked: Mapping[str, Any]) -> TokenRouter:
    """The router of `convert --mode --router` with the options that were asked for."""
    if mode == "upcycle":
        plain = BY_LAYER
    else:
        plain = TokenRouter(granularity="prefix" if router == "auto" else "token")
    return replace(plain, **asked)


def parse_split(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parse_numbers(text: str) -> torch.Tensor:
    """Numbers with commas between them."""
    try:
        return torch.tensor([float(part) for part in text.split(",")])
    except ValueError:
        raise ConfigError(f"{text!r}: expected numbers with commas between them") from None
