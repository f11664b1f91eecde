"""Models and splits as a command line names them."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..errors import ConfigError


def load_model(spec: str) -> nn.Module:
    """A local Hugging Face folder, `package.module:factory`, or a hub name; in eval mode.

    Only safetensors are read, no remote code is run. Raises ConfigError, saying what is wrong.
    """
    if ":" in spec and not Path(spec).exists():
        return _from_factory(spec).eval()
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            f"model {spec!r}: Hugging Face models need transformers: pip install 'moe-rewrite[hf]'"
        ) from None
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


def read_images(path: Path, shape: tuple[int, int, int]) -> torch.Tensor:
    """(N, channels, height, width) in 0 .. 1, resized to `shape`: of a picture, a folder of them
    (in order of their names), or a .npy file of such an array. Raises ConfigError."""
    pictures = (".png", ".jpg", ".jpeg")
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [f for f in files if f.suffix.lower() in (*pictures, ".npy")]
    if not files or not files[0].exists():
        raise ConfigError(f"{path}: expected a .png, .jpg or .npy file, or a folder of them")
    images = []
    for file in files:
        try:
            images.append(_read_picture(file) if file.suffix != ".npy" else _read_array(file))
        except (OSError, ValueError, SyntaxError) as error:
            raise ConfigError(f"{file}: no readable image ({error})") from None
    channels, *size = shape
    fitted = []
    for batch in images:
        if batch.shape[1] not in (1, channels):
            batch = batch[:, :channels] if batch.shape[1] > channels else batch[:, :1]
        if channels == 1 and batch.shape[1] > 1:
            batch = batch.mean(1, keepdim=True)
        batch = batch.expand(-1, channels, -1, -1)
        fitted.append(F.interpolate(batch, size, mode="bilinear", antialias=True))
    return torch.cat(fitted)


def _read_picture(file: Path) -> torch.Tensor:
    from PIL import Image

    with Image.open(file) as image:
        pixels = np.asarray(image.convert("RGB"))
    return torch.tensor(pixels).permute(2, 0, 1).unsqueeze(0) / 255.0


def _read_array(file: Path) -> torch.Tensor:
    array = np.load(file, allow_pickle=False)
    if array.ndim != 4 or array.dtype.kind not in "fu":
        raise ValueError(f"{array.dtype} array of shape {array.shape}, expected (N, C, H, W)")
    return torch.tensor(array).float() / (255.0 if array.dtype == np.uint8 else 1.0)


def read_tasks(folder: Path, part: str) -> dict[str, list[dict[str, str]]]:
    """TRACE's format: a folder a task, each with train.json, a list of {"prompt", "answer"}."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; expected one folder a task inside")
    folders = [folder] if (folder / f"{part}.json").exists() else sorted(folder.iterdir())
    tasks = {}
    for task in folders:
        file = task / f"{part}.json"
        if not file.exists():
            continue
        try:
            records = json.loads(file.read_text())
        except ValueError as error:
            raise ConfigError(f"{file}: not JSON ({error})") from None
        for i, record in enumerate(records):
            ok = isinstance(record, dict) and all(
                isinstance(record.get(k), str) for k in ("prompt", "answer")
            )
            if not ok:
                raise ConfigError(f"{file}, record {i}: expected 'prompt' and 'answer' strings")
        tasks[task.name] = records
    if not tasks:
        raise ConfigError(f"{folder}: no task folder with a {part}.json")
    return tasks
