"""The Python code of documentation pages, and the values that pages take for granted."""

import ast
import json
import re
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import small_model
import torch

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").rglob("*.md")))]
FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)^```\n", re.M)
NOT_RUN = re.compile(r'title="not run: [^"]+"')


@dataclass(frozen=True)
class Block:
    """A fenced block. line: of its first line of code. prints: the text of the fence without a
    language that follows at once; None where none does."""

    page: str
    line: int
    code: str
    runs: bool
    prints: str | None

    def execute(self, names: dict) -> None:
        """Run it among these names; errors name the page and its line."""
        tree = ast.parse("\n" * (self.line - 1) + self.code)
        exec(compile(tree, str(ROOT / self.page), "exec"), names)


def blocks(page: str) -> list[Block]:
    """The Python blocks of a page, in order."""
    text, found = (ROOT / page).read_text(), []
    fences = list(FENCE.finditer(text))
    for fence, after in zip_longest(fences, fences[1:]):
        if fence[1].split(" ")[0] != "python":
            continue
        shown = after and not after[1] and not text[fence.end() : after.start()].strip()
        found.append(
            Block(
                page, text.count("\n", 0, fence.start()) + 2, fence[2],
                not NOT_RUN.search(fence[1]), after[2] if after and shown else None,
            )
        )  # fmt: skip
    return found


def given(folder: Path) -> dict:
    """What docs/README.md says that code may take for granted, here small; ./TRACE in `folder`."""
    ids = torch.randint(1, small_model.WORDS, (8, 10), generator=torch.Generator().manual_seed(1))
    calls = [{"input_ids": rows, "labels": rows} for rows in ids.split(4)]

    def train(moe: torch.nn.Module) -> None:
        optimizer = torch.optim.AdamW(moe.trainable_parameters(), lr=1e-2)
        moe.train()
        for call in calls:
            moe(**call).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    for number in range(2):
        (task := folder / "TRACE" / f"task{number}").mkdir(parents=True)
        records = [{"prompt": f"w{i} w2", "answer": f"w{number + 3}"} for i in range(8)]
        for part in ("train", "test"):
            (task / f"{part}.json").write_text(json.dumps(records))
    return {
        "model": small_model.model(), "tokenizer": small_model.tokenizer(), "ids": ids[:2],
        "mask": torch.ones_like(ids[:2]), "batches": [{"input_ids": c["input_ids"]} for c in calls],
        "train": train,
    }  # fmt: skip
