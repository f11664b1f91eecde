"""Folders of transformers' checkpoints: written as a whole or not at all."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, logging

from ...errors import CheckpointError, ConfigError
from ...utils.folders import require_place, require_writable
from ...utils.one_writer import one_writer
from .formats import FORMATS


def write(
    folder: str | os.PathLike, model: nn.Module, state: Mapping[str, torch.Tensor], base: nn.Module,
    tokenizer: Any, max_shard_size: int | str, check: Callable[[Path], None] | None,
    more: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Write `state` as a checkpoint of `model`, which may be on the meta device.

    base: the dense model, whose generation config and, if it is known, tokenizer are written too.
    check: is given the place of what was written before it is moved to `folder`; what it raises
        leaves the folder as it was.
    more: texts of other files, by name.
    """
    target = require_place(folder)
    require_writable(target.parent)
    place = Path(getattr(base, "name_or_path", "") or ".")
    if place != Path(".") and target.is_dir() and place.is_dir() and place.samefile(target):
        raise ConfigError(
            f"{folder}: the dense model was read from this folder, and its weights would be "
            "replaced; choose another"
        )
    if getattr(base, "generation_config", None) is not None:
        model.generation_config = base.generation_config  # type: ignore[assignment]
    with tempfile.TemporaryDirectory(prefix=".moe_rewrite-", dir=target.parent) as made:
        fresh = Path(made)
        options: Any = {"state_dict": dict(state), "max_shard_size": max_shard_size}
        with quiet():
            model.save_pretrained(fresh, **options)  # type: ignore[operator]
        known = tokenizer if tokenizer is not None else tokenizer_of(base)
        if known is not None:
            known.save_pretrained(fresh)
        for name, text in (more or {}).items():
            (fresh / name).write_text(text)
        if check is not None:
            check(fresh)
        _move(fresh, target)


def _move(fresh: Path, target: Path) -> None:
    """Move the files to where they belong, the configuration last; weights of a save before go."""
    target.mkdir(exist_ok=True)
    new = {p.name for p in fresh.iterdir()}
    with one_writer(target):
        (target / "config.json").unlink(missing_ok=True)
        for old in [*target.glob("model*.safetensors"), target / SAFE_WEIGHTS_INDEX_NAME]:
            if old.name not in new:
                old.unlink(missing_ok=True)
        for name in sorted(new, key=lambda n: n == "config.json"):
            os.replace(fresh / name, target / name)


@contextmanager
def quiet() -> Iterator[None]:
    """Without progress bars and warnings."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def tokenizer_of(base: nn.Module) -> Any:
    """The tokenizer of the folder, or the cached hub name, that the model came from; None without."""
    place = getattr(base, "name_or_path", "") or ""
    if not place:
        return None
    try:
        return AutoTokenizer.from_pretrained(place, local_files_only=True)
    except (OSError, ValueError, KeyError):
        return None


def read(folder: str | os.PathLike) -> nn.Module:
    """The model of a folder, in the dtype that it was written in. Raises CheckpointError for another
    class than those of `FORMATS`, or a damaged folder."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: no configuration can be read ({error})") from None
    if config.model_type not in FORMATS:
        raise CheckpointError(
            f"{folder}: model_type {config.model_type!r}, expected one of {', '.join(FORMATS)}"
        )
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # of safetensors, transformers and the file system
        raise CheckpointError(f"{folder}: cannot be read ({error})") from None
    model, info = loaded
    odd = sorted(
        {*info["missing_keys"], *info["unexpected_keys"], *map(str, info["mismatched_keys"])}
    )
    if odd:
        raise CheckpointError(f"{folder}: tensors are missing or unknown, such as {odd[0]}")
    return model.eval()
