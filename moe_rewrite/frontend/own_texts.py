"""Texts that a language model writes itself: samples of what it can do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def own_texts(
    generate: Callable[..., torch.Tensor], config: Any, device: torch.device, count: int,
    length: int,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """input_ids and attention_mask, (count, up to length) int64, sampled from the model from its
    first token on. A text ends with its end token; what comes after is masked."""
    config = config.get_text_config(decoder=True)
    ends = _ids(config, "eos_token_id")
    padding = next(iter(_ids(config, "pad_token_id") + ends), 0)
    first = next(iter(_ids(config, "bos_token_id")), padding)
    start = torch.full((count, 1), first, device=device)
    ids = generate(
        input_ids=start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0,
        temperature=1.0, top_p=1.0, max_new_tokens=length - 1, pad_token_id=padding,
    )  # fmt: skip
    ended = torch.isin(ids[:, 1:], torch.tensor(ends, dtype=ids.dtype, device=device))
    after = ended.long().cumsum(1) - ended.long() > 0
    mask = torch.cat([torch.ones_like(start), (~after).long()], 1)
    return {"input_ids": ids, "attention_mask": mask}


def _ids(config: Any, name: str) -> list[int]:
    given = getattr(config, name, None)
    if given is None:
        return []
    return list(given) if isinstance(given, (list, tuple)) else [given]
