"""What a folder of adapters says beside tensors: router/router.json."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import CheckpointError
from ..utils.read_files import shown

VERSION = 1
ROUTER = "router"  # the folder of all but the adapters
FACTS, GATE, SHALLOW = "router.json", "router.safetensors", "shallow.safetensors"
BASE = "base"  # the frozen model, as a choice
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
GATE_FIELDS: dict[str, tuple[type, ...]] = {
    "granularity": (str,), "top_k": (int, type(None)), "over_all": (bool,), "base": (bool,),
    "normalize": (bool,), "prior": (float, int), "projection": (int,),
}  # fmt: skip


def is_folder_name(name: str) -> bool:
    """Whether an expert of this name can have a folder, and be named in a request."""
    return NAME.fullmatch(name) is not None and name not in (ROUTER, BASE)


@dataclass(frozen=True)
class Facts:
    """experts: names, in the gate's order. base: name or path of the frozen model, or None.
    kind: its class in transformers. place, argument: the module whose input the gate reads, and the
    name of that input. width: of the features. dtype: of the model. gate: the modelling file's.
    """

    experts: list[str]
    base: str | None
    kind: str
    place: str
    argument: str
    width: int
    dtype: str
    gate: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def of(cls, where: str, said: Any) -> Facts:
        """Raises CheckpointError for anything else than `to_json` gives."""
        if not isinstance(said, dict) or said.get("version") != VERSION:
            version = said.get("version") if isinstance(said, dict) else said
            raise CheckpointError(f"{where}: version {shown(version)}, expected {VERSION}")
        given = {k: v for k, v in said.items() if k != "version"}
        for name in ("kind", "place", "argument", "dtype"):
            _require(where, name, given.get(name), isinstance(given.get(name), str))
        _require(where, "base", given.get("base"), isinstance(given.get("base"), str | None))
        width, names, gate = given.get("width"), given.get("experts"), given.get("gate")
        _require(where, "width", width, type(width) is int and width > 0)
        _require(where, "experts", names, _are_names(names))
        _require(where, "gate", gate, isinstance(gate, dict) and _fits(gate))
        try:
            return cls(**given)
        except TypeError as error:
            raise CheckpointError(f"{where}: {error}") from None


def _are_names(given: Any) -> bool:
    return (
        isinstance(given, list)
        and len(given) > 0
        and all(isinstance(n, str) and is_folder_name(n) for n in given)
        and len(set(given)) == len(given)
    )


def _fits(gate: dict[str, Any]) -> bool:
    return (
        gate.keys() == GATE_FIELDS.keys()
        and all(type(gate[name]) in kinds for name, kinds in GATE_FIELDS.items())
        and gate["granularity"] in ("prefix", "sequence")
        and gate["projection"] >= 0
        and (gate["top_k"] is None or gate["top_k"] > 0)
    )


def _require(where: str, name: str, given: Any, fits: bool) -> None:
    if not fits:
        raise CheckpointError(f"{where}: {name}={shown(given)} is not what save_adapters writes")
