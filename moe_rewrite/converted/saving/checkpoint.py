"""The saved form of what conversion added: a safetensors file and a JSON file that names it.

The JSON is replaced last, in one rename, so a crash leaves the previous save whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import CheckpointError
from ...kernels.ffn.low_precision import DTYPES
from ...utils.atomic_files import link_file, replace_file
from ...utils.folders import require_place
from ...utils.one_writer import one_writer
from ...utils.quantized import inner_tensors, is_quantized, scheme
from ...utils.read_files import parse_tensors, read_bytes, read_json, require_finite, shown
from ...utils.seal import SEAL, require_seal, sealed
from ...utils.tensor_bytes import tensor_bytes

# 1 has no tensor that says which experts the file holds; 2 has whole matrices of a router's sums
FORMAT = 3
READABLE = (1, 2, 3)
META = "moe_rewrite.json"
TRAINERS = "model.safetensors"  # the file that transformers' Trainer resumes from
READS = 100  # at most, of a folder to which others write meanwhile
DENSE = "moe_rewrite.dense."  # before the names of dense tensors that training may have changed
REQUIRED = {
    "recipe": dict,
    "names": list,
    "expansions": list,
    "classes": list,
    "fingerprint": dict,
    "sha256": str,
}


@dataclass(frozen=True)
class Facts:
    """What a save says about its experts.

    names: one for each expert.
    expansions: the number of the `expand` call that added each.
    classes: columns that each added to a head; empty without a head.
    trained: whether each was trained; None in saves of versions that did not record it.
    frozen: names of those that are not trained although they are the newest.
    quantized: the dtype of matrices in low precision; None: experts that can be trained.
    told, solved: of an analytic router, see `AnalyticGate`; told None: those that have sums.
    """

    names: list[str]
    expansions: list[int]
    classes: list[int]
    trained: list[bool] | None
    frozen: list[str]
    told: list[bool] | None = None
    solved: bool = True
    quantized: str | None = None

    @classmethod
    def of(cls, folder: str | os.PathLike, meta: dict[str, Any], experts: int | None) -> Facts:
        """Raises CheckpointError unless `meta` describes this number of experts; None: any."""
        if experts is None:
            names = meta.get("names")
            experts = max(1, len(names)) if isinstance(names, list) else 1
        kinds = {"names": str, "expansions": int, "classes": int, "trained": bool, "told": bool}
        said = {name: meta.get(name) for name in kinds}
        counts = {"classes": (0, experts), "trained": (experts,)}
        for name, given in said.items():
            if name in ("trained", "told") and given is None:
                continue
            right = isinstance(given, list) and all(type(x) is kinds[name] for x in given)
            if not right or len(given) not in counts.get(name, (experts,)):  # type: ignore[arg-type]
                raise CheckpointError(
                    f"{folder}: the saved {name} of experts are malformed: {shown(given)}"
                )
        frozen = meta.get("frozen", [])
        if not isinstance(frozen, list) or not set(map(str, frozen)) <= set(said["names"] or []):
            raise CheckpointError(f"{folder}: the names of frozen experts are malformed")
        dtype = meta.get("quantized")
        if dtype not in (None, *DTYPES):
            raise CheckpointError(
                f"{folder}: experts in {shown(dtype)}: expected {' or '.join(DTYPES)}, or full precision"
            )
        solved = meta.get("solved") is not False
        facts = cls(**said, frozen=frozen, solved=solved, quantized=dtype)  # type: ignore[arg-type]
        if len(set(facts.names)) != experts or not all(0 <= c < 10**6 for c in facts.classes):
            raise CheckpointError(
                f"{folder}: the saved names of experts are malformed: {shown(facts.names)}"
            )
        return facts


def dense_names(tensors: Iterable[str]) -> list[str]:
    """State-dict names of the dense tensors among saved ones."""
    return [name.removeprefix(DENSE) for name in tensors if name.startswith(DENSE)]


@torch.no_grad()
def fill(own: dict[str, torch.Tensor], saved: dict[str, torch.Tensor]) -> None:
    """Copy saved tensors into those of the same names: all or none. Raises CheckpointError."""
    shapes, given = ({k: t.shape for k, t in x.items()} for x in (own, saved))
    if shapes != given:
        odd = sorted(k for k in shapes | given if shapes.get(k) != given.get(k))[:3]
        raise CheckpointError(f"the saved tensors do not fit this model, such as {odd}")
    for name, tensor in saved.items():
        own[name].copy_(tensor)


def write(
    folder: str | os.PathLike, tensors: dict[str, torch.Tensor], facts: dict[str, Any],
    base: dict[str, torch.Tensor],
    more: Callable[[str], dict[str, torch.Tensor]] = lambda base: {}, trains: bool = False,
) -> None:  # fmt: skip
    """Write tensors and facts, with the fingerprint of the model that they belong to, whose state
    dict is `base`. Tensors that hold NaN are written too: `read` refuses them. more: key of the
    base -> other tensors to write. trains: the tensors' file gets the
    name from which trainers resume too.

    The tensors' file has their hash in its name, and the old one is deleted only after the JSON was
    replaced: the JSON on disk always finds the file that it was written with.
    """
    from safetensors.torch import save as to_bytes

    target, of_base = require_place(folder), fingerprint(base)
    tensors = tensors | more(base_key(of_base))
    blob = to_bytes({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()})
    digest = hashlib.sha256(blob).hexdigest()
    meta = {"format": FORMAT, **facts, "fingerprint": of_base, "sha256": digest}
    text = json.dumps(sealed(meta), indent=1, allow_nan=False).encode()
    target.mkdir(parents=True, exist_ok=True)
    with one_writer(target):
        replace_file(target / _tensor_file(digest), blob)
        replace_file(target / META, text)
        files = list(target.glob("moe_rewrite-*.safetensors"))
        named = (target / TRAINERS).exists()
        if trains or named and any(f.samefile(target / TRAINERS) for f in files):
            link_file(target / _tensor_file(digest), target / TRAINERS)
        for old in files:
            if old.name != _tensor_file(digest):
                old.unlink(missing_ok=True)


def _tensor_file(digest: str) -> str:
    return f"moe_rewrite-{digest[:16]}.safetensors"


def read(folder: str | os.PathLike) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The facts and tensors of a saved folder, checked. Raises CheckpointError.

    While others save to it, the save before theirs or theirs is read.
    """
    meta, path, blob = _read_pair(Path(folder))
    if hashlib.sha256(blob).hexdigest() != meta["sha256"]:
        raise CheckpointError(f"{path}: truncated or changed since it was saved")
    tensors = parse_tensors(blob, str(path))
    require_finite(tensors, str(path), lambda name: name.startswith(DENSE))  # a mask's -inf
    return meta, tensors


def mapped(folder: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The tensors of a saved folder, in a mapping of its file: they take no memory until they are
    read, and a later save to the folder leaves them as they are. Raises CheckpointError."""
    from safetensors import SafetensorError, safe_open

    path = Path(folder) / _tensor_file(_read_meta(Path(folder) / META)["sha256"])
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be mapped: {error}") from error


def _read_pair(folder: Path) -> tuple[dict[str, Any], Path, bytes]:
    """The JSON, and the path and bytes of the file that it names: again where another save has
    replaced both in between."""
    before, left = None, READS
    while True:
        meta, left = _read_meta(folder / META), left - 1
        path = folder / _tensor_file(meta["sha256"])
        try:
            return meta, path, read_bytes(path)
        except CheckpointError:
            if meta == before or not left:
                raise
            before = meta


def _read_meta(path: Path) -> dict[str, Any]:
    meta = read_json(path)
    version = meta.get("format") if isinstance(meta, dict) else None
    if version not in READABLE:
        raise CheckpointError(
            f"{path}: format {version!r}, this version reads {', '.join(map(str, READABLE))}: "
            "upgrade moe_rewrite"
        )
    wrong = [k for k, kind in REQUIRED.items() if not isinstance(meta.get(k), kind)]
    if wrong or not re.fullmatch("[0-9a-f]{64}", meta["sha256"]):
        raise CheckpointError(f"{path}: {', '.join(wrong) or 'sha256'} missing or malformed")
    if SEAL in meta:  # saves of versions that did not write it are read too
        require_seal(meta, str(path))
    return meta


def fingerprint(state: dict[str, torch.Tensor]) -> dict[str, str]:
    """Name -> shape and content hash of every tensor of a state dict, and how it is quantised.

    On the meta device, which has no content, the shape alone.
    """
    return {name: _describe(tensor) for name, tensor in state.items()}


def _describe(tensor: torch.Tensor) -> str:
    shape = "x".join(map(str, tensor.shape))
    if is_quantized(tensor):
        held = {name: _describe(inner) for name, inner in inner_tensors(tensor).items()}
        return f"{shape}:{base_key(held)[:32]} as {scheme(tensor)}"
    if tensor.is_meta:
        return shape
    return f"{shape}:{hashlib.sha256(tensor_bytes(tensor)).hexdigest()[:32]}"


def base_key(fingerprint: dict[str, str]) -> str:
    """Hash of a base model's fingerprint."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()


def require_base(meta: dict[str, Any], model: nn.Module) -> None:
    """Raise CheckpointError unless `model` is the one that the save belongs to."""
    ours, saved = fingerprint(model.state_dict()), meta["fingerprint"]
    if meta.get("whole"):  # it brings its own weights: names and shapes have to fit
        ours, saved = ({k: str(v).split(":")[0] for k, v in x.items()} for x in (ours, saved))
    if ours == saved:
        return
    differ = sorted(k for k in ours | saved if ours.get(k) != saved.get(k))
    raise CheckpointError(
        f"the saved experts belong to another base model ({meta.get('model')!s:.100}): {len(differ)} "
        f"tensors differ, such as {differ[0]} ({saved.get(differ[0], 'absent')!s:.100} there, "
        f"{ours.get(differ[0], 'absent')} here). Load the model that they were trained on"
    )
