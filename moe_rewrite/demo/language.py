"""Short texts: a small decoder that tells stories learns recipes, counting and Spanish."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..continual.compare import compare
from ..continual.registry import Setup
from ..continual.results import Result
from ..continual.run import learnt_method
from ..continual.tasks import Task
from ..continual.text import TextProblem
from ..continual.training import Training, adamw, fit
from ..errors import require_package
from ..utils.atomic_files import write_json
from ..utils.text_tables import table
from .digits import METHODS
from .texts import Words, readable, task

NEW = ("recipes", "counting", "spanish")


def language(
    out: Path, seed: int = 0, epochs: int = 12, base_texts: int = 6000, texts: int = 200
) -> dict[str, Result]:
    """Train on stories, convert, learn recipes, counting and Spanish; and the same by fine-tuning.

    Prints accuracies (of the words of the answers), forgetting and what each method says to a prompt
    of every kind; writes results.json, lines.json, pictures and checkpoints into `out`.
    """
    require_package("transformers", "demo", "the demonstration of language")
    torch.manual_seed(seed)
    words = Words()
    problem = TextProblem(words, 64, 32, new_tokens=32)
    stories = task("stories", base_texts, 100, seed)
    dense = _decoder(len(words.words))
    training = Training(epochs=2, batch_size=32, lr=3e-3, seed=seed)
    fit(
        "stories", problem, [(0, item) for item in stories.train],
        lambda batch, task_ids: problem.loss(dense, batch), [adamw(list(dense.parameters()), training)],
        training, training.epochs,
    )  # fmt: skip
    dense.eval()
    known, stream = stories.limited(300), [task(kind, texts, 100, seed) for kind in NEW]
    training = Training(epochs=epochs, batch_size=16, lr=5e-3, seed=seed)
    setup = Setup(split=1, rank=16, alpha=32.0, training=training)
    results = compare(METHODS, dense, problem, stream, setup, known, out=out)
    _show(out, dense, problem, [known, *stream], setup)
    return results


def _decoder(words: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=words, hidden_size=96, intermediate_size=192, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _show(out: Path, dense: Any, problem: TextProblem, tasks: Sequence[Task], setup: Setup) -> None:
    """Print and write what every method says to the first test prompt of each task."""
    known, stream = tasks[0], tasks[1:]
    models = {"before": dense}
    for name in METHODS:
        method = learnt_method(name, dense, problem, stream, setup, known, out=out / name)
        models[name] = method.model_for(None)
    items = [of.test[0] for of in tasks]
    prompts = [item["prompt"] for item in items]
    device = next(dense.parameters()).device
    said = {name: problem.answers(model, prompts, device) for name, model in models.items()}
    said = {"right": [readable(item["answer"]) for item in items]} | said
    asked = [readable(prompt) for prompt in prompts]
    write_json(out / "lines.json", {"prompts": asked} | said)
    for number, prompt in enumerate(asked):
        lines = [(name, answers[number]) for name, answers in said.items()]
        print(table(["who", prompt], lines))
