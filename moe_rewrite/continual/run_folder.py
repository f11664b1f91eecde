"""The folder of a run: states by number of tasks learnt, and progress.json, which names the last.

progress.json is written before the first task and replaced last after each, with a digest of
itself, of every file of its state, and of what the run is.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, ConfigError
from ..utils.atomic_files import replace_file, write_json
from ..utils.read_files import LARGEST_JSON, parse_tensors, read_bytes, require_plain
from ..utils.seal import SEAL, require_seal, sealed
from .identity import differing
from .learner import Learner
from .methods.base import Method
from .results import Result

PROGRESS = "progress.json"
STATE = "state.safetensors"
ANEW = "use another --out, or delete this folder to start anew"


class RunFolder:
    """identity: of the run, from `identity_of`."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self.identity = folder, identity

    def state(self, learnt: int) -> Path:
        return self.folder / f"after-{learnt}"

    def read(self) -> tuple[int, Result | None]:
        """The number of tasks learnt, and the scores so far; None for a run that is not begun.

        Raises ConfigError if it is another run, CheckpointError if a file is missing or changed.
        """
        file = self.folder / PROGRESS
        if not file.exists():
            if states := sorted(self.folder.glob("after-*")):
                raise CheckpointError(f"{file}: missing, beside {states[0].name}: {ANEW}")
            return 0, None
        learnt, result, identity, files = _progress(file)
        if differs := differing(identity, self.identity):
            raise ConfigError(
                f"{self.folder} holds another run, which differs in {', '.join(differs)}: use "
                "another --out, or the same model, data and options to go on"
            )
        for name, content in files.items():
            path = self.state(learnt) / name
            if not path.exists():
                raise CheckpointError(f"{path}: missing: {ANEW}")
            if _digest_of(path) != content:
                raise CheckpointError(f"{path}: changed since it was written: {ANEW}")
        return learnt, result

    def tensors(self, learnt: int) -> dict[str, torch.Tensor]:
        """The state after so many tasks. Raises CheckpointError."""
        file = self.state(learnt) / STATE
        return parse_tensors(read_bytes(file), str(file))

    def begin(self, result: Result) -> None:
        """Write the scores before the first task."""
        self._write_progress(0, result, {})

    def write(self, learnt: int, method: Method, result: Result) -> None:
        """Write state and scores, and delete the older state."""
        from safetensors.torch import save

        target = self.state(learnt)
        shutil.rmtree(target, ignore_errors=True)  # incomplete, from a killed run
        target.mkdir(parents=True)
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in method.state().items()}
        replace_file(target / STATE, save(tensors))
        if isinstance(method, Learner):
            method.model.save_pretrained(target, model_card=False)
        files = {f.name: _digest_of(f) for f in sorted(target.iterdir())}
        self._write_progress(learnt, result, files)
        for old in self.folder.glob("after-*"):
            if old != target:
                shutil.rmtree(old, ignore_errors=True)

    def _write_progress(self, learnt: int, result: Result, files: dict[str, str]) -> None:
        facts = {"learnt": learnt, "result": result.to_dict(), "files": files}
        write_json(self.folder / PROGRESS, sealed(facts | {"identity": self.identity}))


def read_result(folder: Path) -> tuple[int, Result]:
    """The number of tasks learnt in a run's folder, and the scores so far. Raises CheckpointError."""
    learnt, result, _, _ = _progress(folder / PROGRESS)
    return learnt, result


def _progress(file: Path) -> tuple[int, Result, dict[str, Any], dict[str, str]]:
    """(tasks learnt, scores, identity of the run, digests of its files)."""
    progress = _read_sealed(file)
    try:
        learnt, result = progress["learnt"], Result(**progress["result"])
        return learnt, result, progress["identity"], progress["files"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: of another version ({error}): {ANEW}") from None


def _read_sealed(file: Path) -> dict[str, Any]:
    """Facts that were written with a seal. NaN is a score of a model that diverged."""
    try:
        facts = json.loads(read_bytes(file, LARGEST_JSON))
        if not isinstance(facts, dict) or SEAL not in facts:
            raise CheckpointError(
                f"{file}: no progress of a run, or that of an older version: {ANEW}"
            )
        require_seal(facts, str(file))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error}): {ANEW}") from None
    return facts


def _digest_of(path: Path) -> str:
    require_plain(path)
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
