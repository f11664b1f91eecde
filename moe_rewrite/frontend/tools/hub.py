"""Saves on the Hugging Face Hub, through huggingface_hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ...errors import CheckpointError

FILES = ["moe_rewrite.json", "moe_rewrite-*.safetensors", "README.md"]


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(
            'saves on the Hub need huggingface_hub: python -m pip install "moe-rewrite[hf]"'
        ) from None
    return huggingface_hub


def upload(folder: str | os.PathLike, repo_id: str, **options: Any) -> str:
    """Upload a save to a repository, made if there is none; returns its address.

    options: private, token, commit_message, revision, create_pr.
    """
    api = _hub().HfApi(token=options.pop("token", None))
    made = api.create_repo(repo_id, private=options.pop("private", None), exist_ok=True)
    options.setdefault("commit_message", "Upload experts")
    api.upload_folder(
        repo_id=made.repo_id,
        folder_path=str(folder),
        allow_patterns=FILES,
        delete_patterns=FILES[1],
        **options,
    )
    return str(made)


def local_folder(folder: str | os.PathLike, revision: str | None = None) -> str | os.PathLike:
    """A folder on this machine; what looks like ``user/repo`` and is no folder is downloaded.

    Raises CheckpointError where it cannot be.
    """
    name = os.fspath(folder)
    if Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return folder
    hub = _hub()
    try:
        return hub.snapshot_download(name, revision=revision, allow_patterns=FILES)
    except Exception as error:
        raise CheckpointError(
            f"{name}: no such folder, and it cannot be read from the Hub: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}"
        ) from error
