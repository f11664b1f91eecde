"""Files that one environment writes and another reads, with other versions of PyTorch and transformers.

python -m tests.versions.files write FOLDER    # in one environment
python -m tests.versions.files read FOLDER     # in the other
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moe_rewrite
from moe_rewrite import TokenRouter
from moe_rewrite.frontend.example_inputs import random_arguments
from tests.helpers import architectures
from tests.helpers.reference import randomize

NEW, END = 6, 2  # tokens that are generated, and the one that ends a text
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {"num_experts": 2},
    "GPT2": {"num_experts": 2, "router": TokenRouter(granularity="token")},
    "Gemma3": {},
    "Qwen3": {"mode": "upcycle", "num_experts": 4},
    "Bert": {"num_experts": 2},
    "ViT": {"num_experts": 2},
}
GENERATING = ("Llama", "GPT2")  # written in every form that generates


@torch.no_grad()
def write(folder: Path, names: Iterable[str] = MODELS) -> None:
    """Models and what they answer; one subfolder each."""
    for name in names:
        here, dense = folder / name, architectures.build(name)
        dense.save_pretrained(here / "dense")
        moe = moe_rewrite.convert(dense, split=1, **MODELS[name])
        randomize(moe, size=0.5)
        moe.save_pretrained(here / "moe")
        given = random_arguments(moe.host.arguments(None), 90, 2)
        known = {n: t for n, t in given.items() if isinstance(t, torch.Tensor)}
        answers = {"output": _output(moe, known)}
        if name in GENERATING:
            moe.save_pretrained(here / "alone", standalone=True)
            moe_rewrite.export_onnx(moe, here / "model.onnx", cache=True)
            answers["text"] = _text(moe, known)
        if name == "Qwen3":
            moe.save_standard(here / "standard")
        save_file({**{f"given.{n}": t for n, t in known.items()}, **answers}, here / "answers")


@torch.no_grad()
def read(folder: Path) -> Iterator[tuple[str, str, float]]:
    """(model, file, largest difference to what the writer's gave; of a text 0 or 1)."""
    for name in sorted(path.name for path in folder.iterdir()):
        here, kept = folder / name, load_file(folder / name / "answers")
        known = {n.removeprefix("given."): t for n, t in kept.items() if n.startswith("given.")}
        kind: Any = getattr(transformers, type(architectures.build(name)).__name__)
        models: dict[str, Callable[[], Any]] = {
            "save": lambda h=here, k=kind: moe_rewrite.load(
                h / "moe", k.from_pretrained(h / "dense").eval()
            ),
            "alone": lambda h=here: AutoModelForCausalLM.from_pretrained(
                h / "alone", trust_remote_code=True
            ).eval(),
            "standard": lambda h=here: AutoModelForCausalLM.from_pretrained(h / "standard").eval(),
        }
        for form, opened in models.items():
            if form == "save" or (here / form).exists():
                model = opened()
                apart = (_output(model, known) - kept["output"]).abs().max()
                yield name, form, float(apart)
                if "text" in kept:
                    yield (
                        name,
                        f"{form}, text",
                        float(not torch.equal(_text(model, known), kept["text"])),
                    )
        if (file := here / "model.onnx").exists():
            said = moe_rewrite.onnx.generator(file).generate(known["input_ids"], NEW, END)
            yield name, "ONNX, text", float(not torch.equal(said, kept["text"]))


def _output(model: Any, known: dict[str, torch.Tensor]) -> torch.Tensor:
    return next(iter(model(**known).values())).contiguous()


def _text(model: Any, known: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.generate(
        **known, max_new_tokens=NEW, do_sample=False, eos_token_id=END, pad_token_id=0
    )


def main() -> int:
    what, folder = sys.argv[1:]
    if what == "write":
        write(Path(folder))
        return 0
    differ = 0
    for name, form, apart in read(Path(folder)):
        print(f"{name}, {form}: {apart:.1e}")
        differ += apart > 1e-5
    print(f"PyTorch {torch.__version__}, transformers {transformers.__version__}: {differ} differ")
    return int(differ > 0)


if __name__ == "__main__":
    raise SystemExit(main())
