"""Save and load what conversion added: safetensors for tensors, JSON for the rest.

A folder is replaced as a whole by renaming, so a crash leaves the previous save or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .config import LoRAExperts, TokenRouter
from .errors import CheckpointError
from .model import MoEModel

FORMAT = 1
TENSORS, META = "moe_rewrite.safetensors", "moe_rewrite.json"
PREFIX = "moe_rewrite."
SAMPLE = 4096  # elements of a weight that enter its fingerprint


def save(moe: MoEModel, folder: str | os.PathLike) -> None:
    """Write experts, router and recipe of `moe` into a folder, as a whole or not at all."""
    from safetensors.torch import save as to_bytes

    target = Path(folder)
    tensors = {
        k: v.detach().cpu().contiguous().clone()
        for k, v in moe.state_dict().items() if k.startswith(PREFIX)
    }  # fmt: skip
    blob = to_bytes(tensors)
    recipe = moe._compiler.recipe.to_dict()
    recipe["split"] = moe._compiler.at
    meta = {
        "format": FORMAT,
        "recipe": recipe
        | {"router": moe.router.spec.__dict__ | {}, "num_experts": moe.num_experts},
        "names": moe.names,
        "model": type(moe.to_dense()).__name__,
        "fingerprint": fingerprint(moe.to_dense()),
        "sha256": hashlib.sha256(blob).hexdigest(),
    }
    text = json.dumps(meta, indent=1).encode()
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        for name, content in ((TENSORS, blob), (META, text)):
            with open(fresh / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        _swap(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _swap(fresh: Path, target: Path) -> None:
    """Put the fresh files where the old ones are: tensors under a name of their own first.

    The JSON names its tensors by content, and is replaced last, in one rename.
    """
    target.mkdir(exist_ok=True)
    meta = json.loads((fresh / META).read_text())
    tensors = _tensor_file(meta["sha256"])
    os.replace(fresh / TENSORS, target / tensors)
    os.replace(fresh / META, target / META)
    for old in target.glob("moe_rewrite-*.safetensors"):
        if old.name != tensors:
            old.unlink()


def _tensor_file(digest: str) -> str:
    return f"moe_rewrite-{digest[:16]}.safetensors"


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Name -> shape and a hash of a sample of the content, for every dense parameter."""
    found = {}
    for name, p in model.named_parameters():
        shape = "x".join(map(str, p.shape))
        if p.is_meta:
            found[name] = shape
            continue
        flat = p.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLE)].float().cpu().contiguous()
        found[name] = f"{shape}:{hashlib.sha256(sample.numpy().tobytes()).hexdigest()[:16]}"
    return found


def load(folder: str | os.PathLike, model: nn.Module, **convert_options: Any) -> MoEModel:
    """Convert `model` as the saved one was, and fill in the saved experts and router.

    Everything in the folder is checked before the model is looked at. Raises CheckpointError for a
    missing, truncated or tampered file, an unknown version, or another base model.
    """
    from .convert import convert

    meta, tensors = _read(Path(folder))
    _same_base(meta, model)
    recipe = meta["recipe"]
    experts = recipe["experts"]
    if isinstance(experts["sites"], list):
        experts["sites"] = tuple(experts["sites"])
    moe = convert(
        model, mode=recipe["mode"], split=recipe["split"], router=TokenRouter(**recipe["router"]),
        experts=LoRAExperts(**experts), num_experts=1, batch_norm=recipe["batch_norm"],
        **convert_options,
    )  # fmt: skip
    assert isinstance(moe, MoEModel)
    count = len(meta["names"])
    if count > 1:
        moe.expand(count - 1)
    moe.names[:] = meta["names"]
    present = {k: v for k, v in moe.state_dict(keep_vars=True).items() if k.startswith(PREFIX)}
    if set(present) != set(tensors):
        odd = sorted(set(present) ^ set(tensors))[:3]
        raise CheckpointError(f"{folder}: the saved tensors do not fit this model, such as {odd}")
    own = dict(moe._experts_and_router())
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            before = name.startswith(PREFIX + "router.before.")
            if not before:
                raise CheckpointError(f"{folder}: {name} has shape {tuple(tensor.shape)}")
            own[name].data = tensor.clone()
            continue
        with torch.no_grad():
            own[name].copy_(tensor)
    return moe


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    from safetensors.torch import load as from_bytes

    try:
        meta = json.loads((folder / META).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / META}: cannot be read ({error})") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        version = meta.get("format") if isinstance(meta, dict) else None
        raise CheckpointError(
            f"{folder}: format {version!r}, this version reads {FORMAT}: upgrade moe_rewrite"
        )
    missing = {"recipe", "names", "fingerprint", "sha256"} - set(meta)
    if missing or not str(meta["sha256"]).isalnum():
        raise CheckpointError(
            f"{folder / META}: {sorted(missing) or 'sha256'} missing or malformed"
        )
    path = folder / _tensor_file(str(meta["sha256"]))
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    if hashlib.sha256(blob).hexdigest() != meta["sha256"]:
        raise CheckpointError(f"{path}: truncated or changed since it was saved")
    return meta, from_bytes(blob)


def _same_base(meta: dict[str, Any], model: nn.Module) -> None:
    ours, saved = fingerprint(model), meta["fingerprint"]
    if ours == saved:
        return
    names = sorted(set(ours) ^ set(saved)) or [n for n in ours if ours[n] != saved[n]]
    raise CheckpointError(
        f"the saved experts belong to another base model ({meta.get('model')}): {len(names)} "
        f"parameters differ, such as {names[0]}. Load the model they were trained on"
    )
