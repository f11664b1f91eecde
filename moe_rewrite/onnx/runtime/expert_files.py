"""Experts and router in a separate file, for a model that is already deployed."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import torch

from ...errors import CheckpointError, ConfigError
from ...passes.recipe import gates_sum_to_one
from ...utils.atomic_files import replace_file
from ...utils.read_files import parse_json, require_finite, require_plain, shown
from ...utils.seal import require_seal, sealed
from ...utils.tensor_bytes import tensor_bytes
from ..file.metadata import FORMAT, Facts, require_stack
from ..trace.functional import FunctionalModel
from ..trace.weights import ROWS, tensors_of

if TYPE_CHECKING:
    from ...converted.model import MoEModel

ALONE = 1e4  # a router's bias for an expert that gets every row


def export_experts(
    moe: MoEModel, file: str | os.PathLike, example_inputs: Any = None
) -> dict[str, tuple[int, ...]]:
    """Write the active experts and the router as safetensors; returns shapes by name.

    ``moe_rewrite.onnx.load(path, experts=file)`` runs any file that `export_onnx` wrote of this
    model with these experts, whatever number it has; a file with feed-forward experts must have
    been written with ``open_experts=True``. Raises ConfigError if experts are not stacked (regions,
    widened heads): export the whole model again.
    """
    from safetensors.torch import save

    from ..export import base_of

    functional = FunctionalModel(moe, example_inputs, open_experts=True)
    functional.require_open()
    tensors = {n: functional.tensors[n].cpu().contiguous() for n in functional.stacks}
    facts = {
        "format": FORMAT, "base": base_of(functional), "experts": [moe.names[e] for e in functional.active],
        "sha256": {name: _digest(tensor) for name, tensor in tensors.items()},
    }  # fmt: skip
    target = Path(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_file(target, save(tensors, {"moe_rewrite": json.dumps(sealed(facts))}))
    return {n: tuple(t.shape) for n, t in tensors.items()}


def read_experts(
    file: Path, facts: Facts, model: onnx.ModelProto
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """(tensors of a file of experts, names of the experts).

    Raises CheckpointError if it is damaged, newer, of another base model, or does not fit.
    """
    said, tensors = _read(file)
    if said.get("format") != FORMAT:
        raise CheckpointError(
            f"{file}: format {shown(said.get('format'))}, this version reads {FORMAT}: upgrade "
            "moe_rewrite"
        )
    hashes = said.get("sha256")
    if not isinstance(hashes, dict):
        raise CheckpointError(
            f"{file}: an older version wrote it, without hashes: export the experts again"
        )
    require_seal(said, f"{file}: its metadata")
    if said.get("base") != facts.base:
        raise CheckpointError(
            f"{file}: these experts were trained on another base model or cut; export them from "
            "the model that the ONNX file was made from"
        )
    if set(tensors) != set(facts.stacks):
        odd = sorted(set(tensors) ^ set(facts.stacks))[:3]
        raise CheckpointError(f"{file}: other tensors than the model's, for example {odd}")
    changed = [n for n, tensor in tensors.items() if hashes.get(n) != _digest(tensor)]
    if changed:
        raise CheckpointError(
            f"{file}: {changed[0]} changed since it was written: export the experts again"
        )
    require_finite(tensors, str(file))
    old = {t.name: t for t in model.graph.initializer}
    counts = {require_stack(n, facts.stacks[n], old[n], t) for n, t in tensors.items()}
    names = said.get("experts")
    if not isinstance(names, list) or counts != {len(names)}:
        raise CheckpointError(f"{file}: {sorted(counts)} experts in its tensors, named {names}")
    return tensors, [str(n) for n in names]


def _read(file: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The metadata and the tensors."""
    from safetensors import SafetensorError, safe_open

    require_plain(file)
    try:
        with safe_open(file, "pt") as opened:
            written = (opened.metadata() or {}).get("moe_rewrite")
            tensors = {n: opened.get_tensor(n) for n in opened.keys()}  # noqa: SIM118
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{file}: no experts can be read ({error})") from None
    said = None if written is None else parse_json(written, f"{file}: its metadata")
    if not isinstance(said, dict):
        raise CheckpointError(f"{file}: was not written by export_experts()")
    return said, tensors


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def export_adapter(
    moe: MoEModel, name: str | int, file: str | os.PathLike, example_inputs: Any = None
) -> None:
    """Write one expert, with gate 1 for every row, as an adapter file of ONNX Runtime.

    For a file that was exported with ``open_inputs=True``: read the adapter with
    ``onnxruntime.LoraAdapter`` and add it to a call's RunOptions. Raises ConfigError for experts
    that are not stacked, or with a PatchRouter.
    """
    import onnxruntime as ort

    index, router = moe.expert_index(name), moe.router
    router.require_rows("export_adapter")
    functional = FunctionalModel(moe, example_inputs, open_experts=True)
    functional.require_open()
    tensors = tensors_of(moe, functional.graph, (index,), open_experts=True)[0]
    if not router.by_layer:
        tensors[ROWS] = torch.zeros(1, router.size)
        tensors[ROWS][0, -1] = ALONE
    elif not gates_sum_to_one(moe.recipe.experts, router.spec):
        raise ConfigError(
            "export_adapter: the gates of these layers do not sum to one, so a single expert does "
            "not have gate 1; use export_experts()"
        )
    arrays = {key: tensors[key].cpu().contiguous().numpy() for key in functional.stacks}
    parameters = {key: ort.OrtValue.ortvalue_from_numpy(a) for key, a in arrays.items()}
    made = ort.AdapterFormat()
    made.set_adapter_version(1)
    made.set_model_version(FORMAT)
    made.set_parameters(parameters)
    target = Path(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".moe_rewrite-", dir=target.parent) as fresh:
        made.export_adapter(os.path.join(fresh, target.name))
        os.replace(os.path.join(fresh, target.name), target)
