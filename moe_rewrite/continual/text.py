"""Causal language models: the answer to a prompt is learnt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .digests import tokenizer_facts
from .problem import Batch, Model, Problem
from .scores import task_score
from .tasks import Item, Task

IGNORED = -100  # the label of a token that is not learnt


class TextProblem(Problem):
    """Items are {"prompt", "answer"}, or {"ids"} to be learnt as they are.

    max_length: most tokens of an item. A longer answer is cut to half of it, a longer prompt loses
        its beginning.
    batch_size: items a step.
    own_length: tokens of each text that the model generates for the base task.
    new_tokens: most tokens of a generated answer.
    """

    scores = ("accuracy", "loss", "task")

    def __init__(
        self, tokenizer: Any, max_length: int = 512, batch_size: int = 8, own_length: int = 64,
        new_tokens: int = 64,
    ) -> None:  # fmt: skip
        self.tokenizer, self.max_length, self.batch_size = tokenizer, max_length, batch_size
        self.own_length, self.new_tokens = own_length, new_tokens
        known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.padding = next(i for i in known if i is not None)

    def facts(self) -> dict[str, Any]:
        return super().facts() | tokenizer_facts(
            self.tokenizer, lambda probe: self._encode({"prompt": probe, "answer": probe})
        )

    def _encode(self, item: Item) -> tuple[list[int], list[int]]:
        if "ids" in item:
            ids = list(item["ids"])[: self.max_length]
            return ids[:1], ids[1:]
        end = [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []
        answer = self.tokenizer(item["answer"], add_special_tokens=False)["input_ids"]
        answer = (answer + end)[: max(1, self.max_length // 2)]
        prompt = self.tokenizer(item["prompt"])["input_ids"]
        return prompt[-(self.max_length - len(answer)) :], answer

    def batch(self, items: Sequence[Item]) -> Batch:
        """input_ids, attention_mask and labels, (B, S) int64, padded on the right."""
        encoded = [self._encode(item) for item in items]
        length = max(len(p) + len(a) for p, a in encoded)
        ids = torch.full((len(items), length), self.padding)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for i, (prompt, answer) in enumerate(encoded):
            end = len(prompt) + len(answer)
            ids[i, :end] = torch.tensor(prompt + answer)
            mask[i, :end] = 1
            labels[i, len(prompt) : end] = torch.tensor(answer)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def predict(self, model: Model, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(**self.inputs(batch), use_cache=False).logits[:, :-1]
        targets = batch["labels"][:, 1:]
        counts = targets != IGNORED
        return logits[counts], targets[counts]

    def score(self, model: Any, task: Task, kind: str, device: torch.device) -> float:
        if kind != "task":
            return super().score(model, task, kind, device)
        answers = self.answers(model, [item["prompt"] for item in task.test], device)
        return task_score(task.name, answers, task.test)

    def answer(self, model: Any, prompt: str, device: torch.device) -> str:
        """The model's greedy answer to a prompt."""
        return self.answers(model, [prompt], device)[0]

    @torch.no_grad()
    def answers(self, model: Any, prompts: Sequence[str], device: torch.device) -> list[str]:
        """The model's greedy answers, `scoring_batch` prompts at a time, padded on the left."""
        most = self.max_length - self.new_tokens
        encoded = [self.tokenizer(prompt)["input_ids"][-most:] for prompt in prompts]
        said: list[str] = []
        for start in range(0, len(encoded), self.scoring_batch):
            some = encoded[start : start + self.scoring_batch]
            length = max(map(len, some))
            ids = torch.full((len(some), length), self.padding)
            mask = torch.zeros_like(ids)
            for row, prompt in enumerate(some):
                ids[row, length - len(prompt) :] = torch.tensor(prompt)
                mask[row, length - len(prompt) :] = 1
            made = model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), do_sample=False,
                max_new_tokens=self.new_tokens, pad_token_id=self.padding,
            )  # fmt: skip
            said += [self._said(row[length:], model) for row in made.tolist()]
        return said

    def _said(self, ids: list[int], model: Any) -> str:
        """The text of generated ids up to the first that ends it: the rest is padding."""
        config = getattr(model, "generation_config", None)
        ends = getattr(config, "eos_token_id", None)
        known = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
        stop = next((i for i, token in enumerate(ids) if token in known), len(ids))
        return self.tokenizer.decode(ids[:stop], skip_special_tokens=True).strip()

    @torch.no_grad()
    def base_task_of(self, model: Any, count: int, test: int, seed: int) -> Task | None:
        """A task of texts sampled from the model itself."""
        first = self.tokenizer.bos_token_id
        device = next(model.parameters()).device
        start = torch.full((count + test, 1), self.padding if first is None else first)
        start = start.to(device)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            sampled = model.generate(
                input_ids=start, attention_mask=torch.ones_like(start), do_sample=True,
                top_k=0, max_new_tokens=self.own_length - 1, pad_token_id=self.padding,
            )  # fmt: skip
        items = [{"ids": _until_end(row, self.tokenizer.eos_token_id)} for row in sampled.tolist()]
        return Task("its own text", items[:count], items[count:])


def _until_end(ids: list[int], end: int | None) -> list[int]:
    """The ids up to the first end token after the first id."""
    stop = ids.index(end, 1) + 1 if end is not None and end in ids[1:] else len(ids)
    return ids[:stop]
