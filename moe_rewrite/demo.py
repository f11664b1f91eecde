"""The demonstration: new tasks without forgetting, against plain fine-tuning of the same network."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .config import LoRAExperts, TokenRouter
from .convert import convert
from .errors import ConfigError
from .model import MoEModel

DIGIT_TASKS = ((0, 1, 2, 3, 4, 5), (6, 7), (8, 9))
REPLAY = 0.1  # share of each older task kept to train the router with
LENGTH = 192  # tokens of a language item
OWN_LENGTH = 64  # of what the model says of itself


class DigitNet(nn.Module):
    """A small vision transformer: 8x8 image, 2x2 patches, 16 tokens."""

    def __init__(self, width: int = 96, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.position = nn.Parameter(torch.randn(16, width) * 0.02)
        self.blocks = nn.ModuleList(DigitBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """image: (batch, 16, 4) patches -> (batch, 10) logits."""
        x = self.embed(image) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class DigitBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


@dataclass
class Part:
    """One task's examples: x, y tensors with one example a row."""

    x: torch.Tensor
    y: torch.Tensor

    def batches(self, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
        return iter(torch.randperm(len(self.x), generator=generator).split(size))


Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def digits(out: Path, seed: int = 0, epochs: int = 40) -> dict[str, Any]:
    """Train on digits 0-5, convert, teach 6-7 then 8-9; compare with plain fine-tuning.

    Prints accuracy by task and forgetting, writes digits.json and digits.png into `out`.
    """
    torch.manual_seed(seed)
    tasks = [_digit_part(c, seed) for c in DIGIT_TASKS]
    names = ["digits " + "".join(map(str, c)) for c in DIGIT_TASKS]
    dense = DigitNet()

    def cross_entropy(model: nn.Module) -> Step:
        return lambda x, y, task: F.cross_entropy(model(x), y)

    _train(
        "dense network", cross_entropy(dense), list(dense.parameters()), tasks[0][0], None, epochs
    )
    dense.eval()

    def accuracy(model: nn.Module, part: Part) -> float:
        return float((model(part.x).argmax(-1) == part.y).float().mean())

    moe = _convert_digits(dense)
    return _compare(
        "digits", dense, moe, names, tasks, cross_entropy, accuracy, out, epochs, lr=3e-3
    )


def _convert_digits(dense: nn.Module) -> MoEModel:
    moe = convert(
        dense, split=2, router=TokenRouter(granularity="sequence"),
        experts=LoRAExperts(rank=8, sites="all+head"), example_inputs=torch.zeros(2, 16, 4),
    )  # fmt: skip
    assert isinstance(moe, MoEModel)
    return moe


def _digit_part(classes: tuple[int, ...], seed: int) -> tuple[Part, Part]:
    """(train, test) of these digits from scikit-learn's 1,797 images, a quarter for testing."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images / 16.0, dtype=torch.float32)
    patches = images.unfold(1, 2, 2).unfold(2, 2, 2).reshape(-1, 16, 4)
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = order[torch.isin(labels[order], torch.tensor(classes))]
    cut = len(chosen) * 3 // 4
    return (
        Part(patches[chosen[:cut]], labels[chosen[:cut]]),
        Part(patches[chosen[cut:]], labels[chosen[cut:]]),
    )


def _train(
    label: str,
    step: Step,
    parameters: list[Any],
    part: Part,
    replay: list[Part] | None,
    epochs: int,
    lr: float = 3e-3,
    task: int = 0,
    batch: int = 64,
) -> None:
    """AdamW over the task's examples, with those kept of older tasks mixed in."""
    from rich.progress import track

    x, y = [part.x], [part.y]
    owner = [torch.full((len(part.x),), task)]
    for older, kept in enumerate(replay or []):
        repeats = max(1, len(part.x) // (2 * len(kept.x)))
        x.append(kept.x.repeat(repeats, *[1] * (kept.x.ndim - 1)))
        y.append(kept.y.repeat(repeats, *[1] * (kept.y.ndim - 1)))
        owner.append(torch.full((len(kept.x) * repeats,), older))
    mixed, owners = Part(torch.cat(x), torch.cat(y)), torch.cat(owner)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(task)
    for _ in track(range(epochs), description=f"{label:<32}"):
        for index in mixed.batches(batch, generator):
            loss = step(mixed.x[index], mixed.y[index], owners[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def _compare(
    title: str,
    dense: nn.Module,
    moe: MoEModel,
    names: list[str],
    tasks: list[tuple[Part, Part]],
    task_loss: Callable[[nn.Module], Step],
    score: Callable[[nn.Module, Part], float],
    out: Path,
    epochs: int,
    lr: float,
    batch: int = 64,
) -> dict[str, Any]:
    """Teach tasks 1.. to the converted model and to copies of the dense one; report."""
    kept = [_keep(train) for train, _ in tasks]
    plain, replayed = copy.deepcopy(dense), copy.deepcopy(dense)
    methods: dict[str, nn.Module] = {
        "PMoE (10% replay)": moe, "fine-tuning (10% replay)": replayed, "fine-tuning": plain,
    }  # fmt: skip
    results: dict[str, Any] = {}
    for method, model in methods.items():
        rows = [_scores(model, tasks, score)]
        for t in range(1, len(tasks)):
            model.train()
            if isinstance(model, MoEModel):
                if t > 1:
                    model.expand(1)
                step, parameters = _routed_step(model, task_loss(model)), _groups(model, lr)
            else:
                step, parameters = task_loss(model), list(model.parameters())
            replay = None if method == "fine-tuning" else kept[:t]
            label = f"{method}: {names[t]}"
            _train(label, step, parameters, tasks[t][0], replay, epochs, lr, t, batch)
            rows.append(_scores(model, tasks, score))
        results[method] = {"R": rows, "forgot": _forgetting(rows)}
    report = {"tasks": names, "methods": results}
    _show(title, report)
    _save(title, report, out)
    return report


def _groups(moe: MoEModel, lr: float) -> list[Any]:
    """The router is one linear layer that must follow every task: it learns ten times faster."""
    rows: list[Any] = list(moe.router.rows)
    experts = [p for p in moe.trainable_parameters() if not any(p is row for row in rows)]
    return [{"params": rows, "lr": 10 * lr}, {"params": experts}]


def _keep(part: Part) -> Part:
    count = max(1, int(REPLAY * len(part.x)))
    return Part(part.x[:count], part.y[:count])


def _routed_step(moe: MoEModel, loss: Step) -> Step:
    """The task's loss plus the router's: name the task an example came from (base: task 0)."""

    def step(x: torch.Tensor, y: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        gates = moe.route(x).gates
        target = task.view(-1, *[1] * (gates.ndim - 2)).expand(gates.shape[:-1])
        named = F.nll_loss(gates.clamp_min(1e-9).log().flatten(0, -2), target.flatten())
        return loss(x, y, task) + named

    return step


@torch.no_grad()
def _scores(
    model: nn.Module, tasks: list, score: Callable[[nn.Module, Part], float]
) -> list[float]:
    model.eval()
    return [score(model, test) for _, test in tasks]


def _forgetting(rows: list[list[float]]) -> float:
    """Mean drop of each older task's score from its best to the end."""
    last = len(rows) - 1
    drops = [max(r[j] for r in rows[j:]) - rows[last][j] for j in range(last)]
    return sum(drops) / len(drops)


def _show(title: str, report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    for method, result in report["methods"].items():
        table = Table(title=f"{method}: forgot {100 * result['forgot']:.1f} points")
        table.add_column("accuracy after learning")
        for name in report["tasks"]:
            table.add_column(f"on {name}", justify="right")
        for name, row in zip(report["tasks"], result["R"], strict=True):
            table.add_row(name, *(f"{100 * v:.1f}" for v in row))
        Console().print(table)


def _save(title: str, report: dict[str, Any], out: Path) -> None:
    """JSON and a picture of the matrices, each moved into place when it is whole."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    out.mkdir(parents=True, exist_ok=True)
    methods = report["methods"]
    figure, axes = plt.subplots(1, len(methods), figsize=(4 * len(methods), 3.6), squeeze=False)
    for axis, (method, result) in zip(axes[0], methods.items(), strict=True):
        axis.imshow(result["R"], vmin=0, vmax=1, cmap="viridis")
        axis.set_title(f"{method}\nforgot {100 * result['forgot']:.1f} points", fontsize=10)
        ticks = range(len(report["tasks"]))
        axis.set_xticks(ticks, report["tasks"], rotation=20, fontsize=8)
        axis.set_yticks(ticks, [f"after {n}" for n in report["tasks"]], fontsize=8)
        for i, row in enumerate(result["R"]):
            for j, v in enumerate(row):
                colour = "black" if v > 0.6 else "white"
                axis.text(j, i, f"{100 * v:.0f}", ha="center", va="center", color=colour)
    figure.tight_layout()
    picture, text = out / f"{title}.png", out / f"{title}.json"
    figure.savefig(f"{picture}.part", format="png", dpi=120)
    plt.close(figure)
    os.replace(f"{picture}.part", picture)
    Path(f"{text}.part").write_text(json.dumps(report, indent=1))
    os.replace(f"{text}.part", text)
    print(f"picture: {picture}   figures: {text}")


def language(
    folder: str,
    dense: nn.Module,
    tasks: dict[str, dict[str, list[dict[str, str]]]],
    out: Path,
    split: int | float | str,
    epochs: int,
    max_samples: int,
    seed: int,
) -> dict[str, Any]:
    """The same on a causal language model; the score is the accuracy of the answer's tokens."""
    from transformers import AutoTokenizer

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    missing = sorted(set(tasks["train"]) ^ set(tasks["test"]))
    if missing:
        raise ConfigError(f"tasks {missing} lack train.json or test.json")
    parts = [
        (_encode(tokenizer, tasks["train"][n][:max_samples]),
         _encode(tokenizer, tasks["test"][n][:max_samples]))
        for n in tasks["train"]
    ]  # fmt: skip
    own = _own_text(dense, max_samples)
    moe = convert(dense, split=split)
    assert isinstance(moe, MoEModel)

    def loss(model: nn.Module) -> Step:
        return lambda x, y, task: model(input_ids=x, labels=y, use_cache=False).loss

    def accuracy(model: nn.Module, part: Part) -> float:
        right = counted = 0
        for x, y in zip(part.x.split(8), part.y.split(8), strict=True):
            guess = model(input_ids=x, use_cache=False).logits[:, :-1].argmax(-1)
            keep = y[:, 1:] != -100
            right += int((guess == y[:, 1:])[keep].sum())
            counted += int(keep.sum())
        return right / max(counted, 1)

    names = ["its own text", *tasks["train"]]
    return _compare(
        "language", dense, moe, names, [own, *parts], loss, accuracy, out, epochs,
        lr=1e-3, batch=8,
    )  # fmt: skip


@torch.no_grad()
def _own_text(model: Any, count: int, test: int = 32) -> tuple[Part, Part]:
    """(train, test) of what the model says of itself, greedily after one random token: the first
    task, which shows what is lost of it."""
    start = torch.randint(3, model.config.vocab_size, (count + test, 1))
    ids = model.generate(
        start, attention_mask=torch.ones_like(start), do_sample=False, pad_token_id=0,
        min_new_tokens=OWN_LENGTH - 1, max_new_tokens=OWN_LENGTH - 1,
    )  # fmt: skip
    x = torch.zeros(len(ids), LENGTH, dtype=torch.long)
    y = torch.full_like(x, -100)
    x[:, :OWN_LENGTH], y[:, 1:OWN_LENGTH] = ids, ids[:, 1:]
    return Part(x[:count], y[:count]), Part(x[count:], y[count:])


def _encode(tokenizer: Any, records: list[dict[str, str]]) -> Part:
    """Prompt and answer as ids (items, LENGTH), cut in the prompt; labels on the answer only."""
    ids = torch.zeros(len(records), LENGTH, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, record in enumerate(records):
        answer = tokenizer(record["answer"], add_special_tokens=False)["input_ids"][: LENGTH // 2]
        prompt = tokenizer(record["prompt"])["input_ids"][-(LENGTH - len(answer)) :]
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : end] = torch.tensor(answer)
    return Part(ids, labels)
