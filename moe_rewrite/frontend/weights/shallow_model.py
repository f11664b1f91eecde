"""The part of a model of transformers before one of its modules, with that part's tensors only."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from ...errors import CheckpointError, InputError


class _Reached(Exception):
    """The run came to the place; `features` are that module's input."""

    def __init__(self, features: torch.Tensor) -> None:
        super().__init__()
        self.features = features


class ShallowModel:
    """A model that runs up to a place. Its other modules are on the meta device, without values.

    model: of one of transformers' classes. place: the module whose input is wanted. argument: that
    input's name; empty for the first positional one.
    """

    def __init__(self, model: nn.Module, place: str, argument: str) -> None:
        def stop(module: nn.Module, unnamed: tuple, kwargs: dict[str, Any]) -> NoReturn:
            raise _Reached(kwargs[argument] if argument else unnamed[0])

        self.model = model.eval()
        model.get_submodule(place).register_forward_pre_hook(stop, with_kwargs=True)

    @torch.no_grad()
    def features(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, S, D) at the place, of token ids (B, S) int64. Raises InputError for more positions
        than the model has."""
        most = getattr(self.model.config, "max_position_embeddings", None)
        if most is not None and ids.shape[1] > most:
            raise InputError(f"{ids.shape[1]} tokens, expected at most {most}: shorten the prompt")
        try:
            self.model(input_ids=ids)
        except _Reached as reached:
            return reached.features
        raise CheckpointError(
            f"{type(self.model).__name__} ran to its end without the module at the cut"
        )


@torch.no_grad()
def tensors_before(
    model: nn.Module, place: str, arguments: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """The parameters and buffers of the modules that a call enters before a place, each by its
    name."""
    entered: dict[str, nn.Module] = {}

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            if name == place:
                raise _Reached(torch.empty(0))
            entered[name] = module

        return hook

    hooks = [m.register_forward_pre_hook(enter(n)) for n, m in model.named_modules()]
    with suppress(_Reached):
        model(**arguments)
    for hook in hooks:
        hook.remove()
    found: dict[str, torch.Tensor] = {}
    for name, module in entered.items():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        found |= {f"{name}.{leaf}" if name else leaf: t.detach() for leaf, t in own}
    return found


def read(
    folder: Path, kind: str, tensors: Mapping[str, torch.Tensor], place: str, argument: str,
    dtype: torch.dtype,
) -> ShallowModel:  # fmt: skip
    """The shallow model of a folder with its config.json.

    kind: name of the model's class in transformers. tensors: those of `tensors_before`. Raises
    CheckpointError for another class, or tensors or a place that it does not have.
    """
    made = getattr(transformers, kind, None)
    if not (isinstance(made, type) and issubclass(made, PreTrainedModel)):
        raise CheckpointError(f"{folder}: {kind!r} is no model of this version of transformers")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = made(config).to(dtype)  # type: ignore[arg-type]
        for name, tensor in tensors.items():
            _put(model, name, tensor)
        model.get_submodule(place)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{folder}: {kind} cannot be made ({error})") from None
    _require_whole(model, place, folder)
    return ShallowModel(model, place, argument)


def _require_whole(model: nn.Module, place: str, folder: Path) -> None:
    """Raises CheckpointError where a module before the place has no values: PyTorch would add
    tensors of the meta device to others without a word."""
    found = tensors_before(model, place, {"input_ids": torch.zeros(1, 1, dtype=torch.long)})
    missing = [name for name, tensor in found.items() if tensor.is_meta]
    if missing:
        raise CheckpointError(f"{folder}: no {missing[0]}, which runs before the cut")


def _put(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Raises ValueError where a model has no such tensor."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    table = next((t for t in tables if isinstance(t.get(leaf), torch.Tensor)), None)
    if table is None or table[leaf].shape != tensor.shape:
        raise ValueError(f"it has no {name} of shape {tuple(tensor.shape)}")
    is_parameter = table is module._parameters
    table[leaf] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder; None without one."""
    if not (folder / "tokenizer_config.json").exists():
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: its tokenizer cannot be read ({error})") from None
