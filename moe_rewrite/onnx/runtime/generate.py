"""Call an exported model in ONNX Runtime, and generate greedily with it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import CheckpointError, ConfigError, InputError
from ..file.metadata import read_facts
from .expert_files import read_experts
from .session import open_session, run


class OnnxModel:
    """An exported file, opened in ONNX Runtime. Raises CheckpointError as `load` does.

    experts: names of the experts that it runs with.
    """

    def __init__(
        self, path: str | os.PathLike, experts: str | os.PathLike | None = None,
        providers: list[Any] | None = None, options: Any = None,
    ) -> None:  # fmt: skip
        self.path = Path(path)
        self.facts, model = read_facts(self.path)
        self.experts, replaced = self.facts.experts, None
        if experts is not None:
            replaced, self.experts = read_experts(Path(experts), self.facts, model)
        del model
        try:
            self.session = open_session(self.path, replaced, providers, options)
        except Exception as error:  # ONNX Runtime's errors have no common base
            raise CheckpointError(
                f"{self.path}: ONNX Runtime cannot open it ({str(error).splitlines()[0]})"
            ) from None
        inputs = (i.name for i in self.session.get_inputs())
        self.inputs = [n for n in inputs if n not in self.facts.stacks]
        self.outputs = [o.name for o in self.session.get_outputs()]

    def __call__(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Outputs by name. Raises InputError if the inputs are not those of the graph."""
        missing, unknown = set(self.inputs) - set(inputs), set(inputs) - set(self.inputs)
        if missing or unknown:
            raise InputError(
                f"{self.path.name} takes {', '.join(self.inputs)}; "
                f"missing {sorted(missing)}, unknown {sorted(unknown)}"
            )
        self._require_sizes(inputs)
        return dict(zip(self.outputs, run(self.session, inputs), strict=True))

    def _require_sizes(self, inputs: Mapping[str, Any]) -> None:
        for name, dims in self.facts.largest.items():
            for dim, size in dims.items():
                if inputs[name].shape[dim] > size:
                    raise InputError(
                        f"{name} has shape {tuple(inputs[name].shape)}: this file holds for at "
                        f"most {size} in dimension {dim}"
                    )


def load(
    path: str | os.PathLike, experts: str | os.PathLike | None = None,
    providers: list[Any] | None = None,
) -> OnnxModel:  # fmt: skip
    """Open an exported file in ONNX Runtime.

    experts: a file of `export_experts`, whose experts replace the file's own.
    providers: ONNX Runtime's execution providers; None: the CPU.

    Raises CheckpointError, with the reason, for files that are damaged, newer, not written by this
    package, of another base model, or that refer to weights outside their folder.
    """
    return OnnxModel(path, experts, providers)


class Generator(OnnxModel):
    """Greedy generation with a file that was exported with ``cache=True``: one graph reads the
    prompt and writes every token after it. Raises ConfigError for a file without a cache."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.facts.cache or "input_ids" not in self.inputs:
            raise ConfigError(f"{self.path.name} keeps no cache: export it with cache=True")
        self._shapes = {
            i.name: (i.shape, np.dtype(np.float16 if "16" in i.type else np.float32))
            for i in self.session.get_inputs()
            if i.name.startswith(("past_key_values.", "past_router."))
        }

    def generate(
        self, input_ids: torch.Tensor, max_new_tokens: int, eos_token_id: int | None = None,
        pad_token_id: int = 0, attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """(B, S + new) int64 ids: the prompts and the generated tokens.

        input_ids: (B, S) int64.
        max_new_tokens: generation ends after so many, or when every row has ended.
        eos_token_id: after it a row continues with `pad_token_id`; None: no row ends.
        pad_token_id: see there.
        attention_mask: (B, S), 0 for padding on the left; None: none is padding.

        Raises InputError for ids of another shape.
        """
        if input_ids.ndim != 2 or not input_ids.numel():
            raise InputError(
                f"input_ids of shape {tuple(input_ids.shape)}: expected (batch, length)"
            )
        ids = input_ids.numpy()
        mask = np.ones_like(ids) if attention_mask is None else attention_mask.numpy()
        state = {n: np.zeros(_empty(s, len(ids)), d) for n, (s, d) in self._shapes.items()}
        written, new = [ids], ids
        going = np.ones(len(ids), bool)
        for _ in range(max_new_tokens):
            feeds = {"input_ids": new, "attention_mask": mask, **state}
            self._require_sizes(feeds)
            made = dict(
                zip(
                    self.outputs,
                    self.session.run(None, {n: feeds[n] for n in self.inputs}),
                    strict=True,
                )
            )
            best = made["logits"][:, -1].argmax(-1)
            new = np.where(going, best, pad_token_id).astype(ids.dtype)[:, None]
            written.append(new)
            if eos_token_id is not None:
                going &= new[:, 0] != eos_token_id
                if not going.any():
                    break
            mask = np.concatenate([mask, np.ones_like(new)], 1)
            state = {n: made[_present(n)] for n in self._shapes}
        return torch.from_numpy(np.concatenate(written, 1))


def _present(past: str) -> str:
    if past.startswith("past_router."):
        return "present_router." + past.removeprefix("past_router.")
    return "present." + past.removeprefix("past_key_values.")


def _empty(shape: list[Any], batch: int) -> list[int]:
    """The shape of a state before the first token: its dynamic dimensions are the batch, then 0."""
    return [batch, *(0 if isinstance(size, str) else size for size in shape[1:])]
