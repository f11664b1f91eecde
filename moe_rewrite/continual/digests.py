"""Digests of what a user gives: items, options, configurations of models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import torch

from ..errors import ConfigError
from ..utils.content_key import content_key
from ..utils.tensor_bytes import tensor_bytes

UNSTEADY = ("_name_or_path", "transformers_version")  # they say where a model is, not what it does
PROBE = "Which tokenizer? The quick brown fox: 0123, été, \u6f22\u5b57."  # tells tokenizers apart


def digest(content: Any) -> str:
    """Of nested lists, dicts, numbers, strings, arrays and tensors, by type and content.

    Raises ConfigError for anything else.
    """
    return hashlib.sha256(repr(content_key(content, _other)).encode()).hexdigest()[:32]


def config_digest(config: Any) -> str | None:
    """Of a configuration of Hugging Face's, by its values; None for a model without one."""
    if not hasattr(config, "to_dict"):
        return None
    values = {k: v for k, v in config.to_dict().items() if k not in UNSTEADY}
    text = json.dumps(values, default=lambda v: type(v).__name__, skipkeys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def tokenizer_facts(tokenizer: Any, encode: Callable[[str], Any]) -> dict[str, str]:
    """Digests of a tokenizer's vocabulary, and of what `encode` makes of a text by it."""
    vocabulary: dict[str, int] = getattr(tokenizer, "get_vocab", dict)()
    return {
        "vocabulary": digest(sorted(vocabulary.items())),
        "tokens": digest(encode(PROBE)),
    }


def _other(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        content = hashlib.sha256(tensor_bytes(value)).hexdigest()
        return "tensor", str(value.dtype), tuple(value.shape), content
    raise ConfigError(
        f"an object of type {type(value).__name__} among items or options: its content cannot be "
        "told from another's, which resuming needs: use numbers, strings, arrays and tensors, or "
        "run without a folder"
    )
