"""The router of a folder of adapters: the frozen model up to the cut, and the gate."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CheckpointError, InputError, require_package
from ..utils.read_files import parse_tensors, read_bytes, read_json, require_finite
from .facts import BASE, FACTS, GATE, ROUTER, SHALLOW, Facts

if TYPE_CHECKING:
    from ..frontend.standalone.modeling import Gate
    from ..frontend.weights.shallow_model import ShallowModel

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


class AdapterRouter:
    """Which of a folder's adapters a prompt gets. Threads may share one.

    A prompt is a text, token ids, or messages of a chat, for which the tokenizer's template is
    used. Its gate is that of the converted model's router: after the whole prompt for
    ``granularity="prefix"``, over it for ``"sequence"``. The frozen model is named ``"base"``.

    folder: as `MoEModel.save_adapters` wrote it. names: the experts, as the adapters' folders.
    base: name or path of the frozen model, if it is known. tokenizer: None without one.
    """

    def __init__(
        self, folder: Path, facts: Facts, model: ShallowModel, gate: Gate, tokenizer: Any
    ) -> None:
        self.folder, self.names, self.base = folder, facts.experts, facts.base
        self.tokenizer = tokenizer
        self._model, self._gate = model, gate
        self._outputs = [BASE, *self.names] if facts.gate["base"] else self.names

    @classmethod
    def load(cls, folder: str | os.PathLike) -> AdapterRouter:
        """Read a folder. Raises CheckpointError if it is none, damaged, or of another version."""
        require_package("transformers", "hf", "AdapterRouter")
        from ..frontend.weights import shallow_model

        place = Path(folder) / ROUTER
        if not (place / FACTS).exists():
            raise CheckpointError(
                f"{folder}: has no {ROUTER}/{FACTS}: expected a folder that save_adapters (moe-rewrite "
                "serve-adapters) wrote"
            )
        facts = Facts.of(str(place / FACTS), read_json(place / FACTS))
        dtype = getattr(torch, facts.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(f"{place / FACTS}: {facts.dtype!r} is no dtype of PyTorch")
        model = shallow_model.read(
            place, facts.kind, _tensors(place / SHALLOW), facts.place, facts.argument, dtype
        )
        gate = _gate(facts, _tensors(place / GATE), str(place / GATE))
        return cls(Path(folder), facts, model, gate, shallow_model.read_tokenizer(place))

    def choose(self, prompt: Prompt) -> str:
        """The name of the adapter with the largest gate, or ``"base"``; of equal ones the first, the
        frozen model before the experts. Raises as `ids`."""
        weights = self.weights(prompt)
        return max(weights, key=lambda name: weights[name])

    def weights(self, prompt: Prompt) -> dict[str, float]:
        """Name -> gate of the frozen model, where the router has it as an output, and of every
        expert. Raises as `ids`."""
        ids = torch.tensor([self.ids(prompt)])
        gates = self.gates(self.features(ids))[0, -1]
        return dict(zip(self._outputs, gates.tolist(), strict=True))

    def ids(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt. Raises InputError if it has none, holds ids that the model does
        not know, or needs a tokenizer or a chat template that there is not."""
        if isinstance(prompt, str):
            ids = list(self._known_tokenizer()(prompt)["input_ids"])
        elif prompt and all(isinstance(m, Mapping) for m in prompt):
            ids = self._ids_of_chat(prompt)
        else:
            ids = list(prompt)  # type: ignore[arg-type]
        size = self._model.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        if not ids or any(type(i) is not int or not 0 <= i < size for i in ids):
            odd = next((i for i in ids if type(i) is not int or not 0 <= i < size), None)
            said = "no tokens" if not ids else f"token {odd!r}"
            raise InputError(f"prompt: {said}, expected at least one id from 0 to {size - 1}")
        return ids

    def _ids_of_chat(self, messages: Any) -> list[int]:
        tokenizer = self._known_tokenizer()
        if getattr(tokenizer, "chat_template", None) is None:
            raise InputError("messages: the tokenizer has no chat template; send a prompt")
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # whatever a template raises
            raise InputError(f"messages: the chat template refuses them ({error})") from None
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def _known_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise InputError(
                f"{self.folder} has no tokenizer: pass token ids, or write it by "
                "save_adapters(folder, tokenizer=...)"
            )
        return self.tokenizer

    def features(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, S, D) at the cut, of token ids (B, S) int64."""
        return self._model.features(ids)

    @torch.no_grad()
    def gates(self, features: torch.Tensor) -> torch.Tensor:
        """(B, S, [1 +] E) fp32, the frozen model's first, of features (B, S, D) without padding;
        (B, 1, [1 +] E) of a sequence router."""
        from ..frontend.standalone.modeling import Plan

        return self._gate(features, Plan())


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    tensors = parse_tensors(read_bytes(path), str(path))
    require_finite(tensors, str(path), may_be_infinite=lambda name: True)
    return tensors


def _gate(facts: Facts, tensors: dict[str, torch.Tensor], where: str) -> Gate:
    from ..frontend.standalone.modeling import Gate

    # the frozen model's row is one more output here, whose gate is asked for too
    rows = len(facts.experts) + int(facts.gate["base"])
    gate = Gate(facts.width, rows, facts.gate | {"base": False})
    require_finite(tensors, where)
    try:
        gate.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{where}: {str(error).splitlines()[-1].strip()}") from None
    return gate.requires_grad_(False)
