"""The methods of a converted model that save it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...errors import ConfigError, require_package
from ...frontend.tools import hub
from ...utils.sharded import gathered
from .. import low_precision
from ..expert_methods import ExpertMethods
from ..expert_set import ExpertSet
from . import checkpoint
from .model_card import write_card
from .state_dict import ADDED, FACTS, added_tensors, to_tensor

IGNORED = {
    "max_shard_size", "safe_serialization", "save_function", "save_original_format",
    "save_peft_format", "token", "variant",
}  # fmt: skip


class Saving(ExpertMethods):
    """save_only_added: whether `save_pretrained` leaves the frozen dense weights out; trainers, which
    call it without options, follow this."""

    reference: Any
    save_only_added = True
    after_loading: Callable[[checkpoint.Facts], None]

    def save_pretrained(
        self, folder: str | os.PathLike, *, save_only_added: bool | None = None,
        model_card: bool = True, state_dict: dict[str, torch.Tensor] | None = None,
        is_main_process: bool | None = None, standalone: bool = False, tokenizer: Any = None,
        verify: bool = True, **options: Any,
    ) -> None:  # fmt: skip
        """Write what was added (experts, router, recipe) as safetensors and JSON. A crash leaves the
        folder's previous save whole.

        Of a model that is sharded over processes, all of them must call this; the first one writes.

        save_only_added: False writes the dense weights too; `moe_rewrite.load` then takes a model
            with any weights. None: as `moe.save_only_added` says.
        model_card: also write README.md with the report, unless there is one of another's.
        state_dict, is_main_process: passed by trainers, for which the tensors' file has a second
            name, from which they resume. state_dict: gathered tensors to write instead of one's own.
        standalone: write a folder that transformers' auto classes read without this package, by
            ``from_pretrained(folder, trust_remote_code=True)``: all weights, the configuration and
            a modelling file. For LoRA experts with a TokenRouter; experts that are off are left
            out. It takes tokenizer, verify and max_shard_size as `save_standard` does; nothing is
            written if anything is refused.
        options: those of transformers that say how dense weights are written are ignored.

        Raises ConfigError for an unknown option, and for quantised dense weights that are to be
        written; if standalone, ConversionError for what the modelling file does not compute, or
        EquivalenceError.
        """
        unknown = sorted(set(options).difference(IGNORED))
        if unknown:
            raise ConfigError(
                f"save_pretrained {unknown[0]}={options[unknown[0]]!r}: no such option of a converted "
                "model; it takes save_only_added"
            )
        if standalone:
            require_package("transformers", "hf", "save_pretrained(standalone=True)")
            from . import standalone as written_alone

            shards = options.get("max_shard_size", "5GB")
            written_alone.save(self, folder, shards, tokenizer, verify)
            return
        only = self.save_only_added if save_only_added is None else save_only_added
        if not only:
            self._store.require_plain("save_only_added=False")
        given, facts = state_dict or {}, self._facts()
        tensors = {
            name: given[of] if (of := name.removeprefix(checkpoint.DENSE)) in given else gathered(t)
            for name, t in self._own_tensors(whole=not only).items()
        }
        if not only:
            facts["whole"] = True
        if is_main_process is False or self._store.written_by_another:
            return
        trains = is_main_process is not None
        checkpoint.write(
            folder, tensors, facts, self.reference.state, marked(self._experts), trains
        )
        if model_card:
            write_card(self, Path(folder))

    def save_standard(
        self, folder: str | os.PathLike, format: str = "auto", *, max_shard_size: int | str = "5GB",
        tokenizer: Any = None, verify: bool = True,
    ) -> str:  # fmt: skip
        """Write an upcycled language model as a checkpoint of one of transformers' own classes, which
        `AutoModelForCausalLM.from_pretrained` and other tools read without this package; returns
        the format. So is a carved one written whose tokens have one expert beside shared ones, by
        routers without a bias.

        format: ``"mixtral"``, ``"qwen3_moe"``, ``"qwen2_moe"``, ``"glm4_moe"`` or ``"olmoe"``;
            ``"auto"``: the first of these that holds the model.
        max_shard_size: of a safetensors file, in bytes or as ``"5GB"``.
        tokenizer: to write beside it; None: that of the folder that the dense model came from.
        verify: read what was written and compare its logits before it is moved to the folder.

        Nothing is written if anything is refused. Raises ConversionError with what the class lacks
        and the nearest one that has it, or EquivalenceError.
        """
        require_package("transformers", "hf", "save_standard")
        from . import standard

        return standard.save(self, folder, format, max_shard_size, tokenizer, verify)  # type: ignore[arg-type]

    def save_adapters(
        self, folder: str | os.PathLike, *, tokenizer: Any = None, verify: bool = True
    ) -> None:
        """Write every expert that is on as an adapter in PEFT's format, in a folder of its name, and
        the router with the frozen model up to the cut in ``router/``, to serve one adapter or a
        mixture a request; `moe_rewrite.serve.AdapterRouter` reads it.

        tokenizer: to write beside the router; None: that of the folder that the dense model came
            from, if it is known.
        verify: read what was written, and compare features and gates with the converted model's
            before it is moved to the folder.

        The folder is new, empty, or an earlier one of this kind, which is replaced as a whole;
        nothing is written if anything is refused. For LoRA experts on linear maps of a language
        model with a TokenRouter that reads the prefix or the sequence. Raises ConversionError or
        ConfigError for what the files cannot hold, or EquivalenceError.
        """
        require_package("transformers", "hf", "save_adapters")
        from . import adapters

        adapters.save(self, folder, tokenizer, verify)

    def push_to_hub(
        self, repo_id: str, *, save_only_added: bool | None = None, **options: Any
    ) -> str:
        """Save to a repository of the Hugging Face Hub, made if there is none; returns its address.
        `moe_rewrite.load(repo_id, model)` reads it.

        save_only_added: as for `save_pretrained`.
        options: private, token, commit_message, revision, create_pr.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, save_only_added=save_only_added)
            return hub.upload(folder, repo_id, **options)

    def saved_tensors(self, whole: bool = False) -> dict[str, torch.Tensor]:
        """What a save holds: the added tensors, and dense ones that training may have changed (all
        of them if `whole`)."""
        return {name: gathered(tensor) for name, tensor in self._own_tensors(whole).items()}

    def _own_tensors(self, whole: bool) -> dict[str, torch.Tensor]:
        """The same as this process has them."""
        dense = self._store.persistent_tensors() if whole else self._store.written_tensors()
        return dict(added_tensors(self)) | {checkpoint.DENSE + n: t for n, t in dense.items()}

    def _facts(self) -> dict[str, Any]:
        named = {"model": type(self.reference.original).__name__, "recipe": self.recipe.to_dict()}
        return named | self._experts.facts()

    def restore(self, tensors: dict[str, torch.Tensor], facts: checkpoint.Facts) -> None:
        """Load saved tensors: all or none. Raises CheckpointError."""
        experts, tensors = self._experts, {k: t for k, t in tensors.items() if k != FACTS}
        if experts.head is not None:
            experts.head.widen_all(facts.classes)
        low_precision.become(experts.sites, facts.quantized)
        self._store.copy_on_write(*checkpoint.dense_names(tensors))
        tensors |= self.router.in_this_layout(tensors, ADDED + "router.")
        checkpoint.fill(self.saved_tensors(), tensors)
        experts.take_over(facts)
        self.after_loading(facts)


def marked(experts: ExpertSet) -> Any:
    """Base key -> the tensor that says which experts a file holds, for `load_state_dict`."""
    return lambda base: {FACTS: to_tensor(experts.facts() | {"base": base})}
