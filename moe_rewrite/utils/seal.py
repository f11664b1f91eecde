"""A digest of facts among the facts themselves, so that an edited JSON is noticed."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ..errors import CheckpointError

SEAL = "meta_sha256"


def sealed(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts with their digest."""
    return facts | {SEAL: _digest(facts)}


def require_seal(facts: dict[str, Any], where: str) -> None:
    """Raise CheckpointError, which begins with `where`, unless the facts are as they were sealed."""
    plain = {k: v for k, v in facts.items() if k != SEAL}
    if facts.get(SEAL) != _digest(plain):
        raise CheckpointError(f"{where}: changed since it was saved")


def _digest(facts: dict[str, Any]) -> str:
    """Of all facts, in an order and form of their own."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
