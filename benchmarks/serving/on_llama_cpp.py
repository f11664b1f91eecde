"""Experts in a real llama.cpp: as adapters behind the proxy, as their mixture, and as an upcycled
checkpoint of a class that llama.cpp has."""

# python -m benchmarks.serving.on_llama_cpp --llama-server FILE --llama-cpp FOLDER
#     [--converter-python VENV/bin/python] [--quick]
# The models, prompts and comparison of benchmarks.serving.on_vllm; all files and caches in float32.
# Adapters: one a prompt, `lora: [{id, scale}]`. Mixture: every adapter with the router's gate as its
# scale. Mixtral: four experts a feed-forward, two of them for a token, by save_standard. The files are
# made by llama.cpp's own converters.

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import transformers

from ..tools.report import parser
from . import models
from .adapters import MODEL, compared_adapters, proxied
from .answers import compared, report
from .llama_cpp import LlamaCpp, answered

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Given:
    engine: LlamaCpp
    place: Path
    dense: Any
    tokens: Any
    count: int
    quick: bool


def adapters(given: Given) -> dict[str, Rows]:
    moe = models.progressive(given.dense, given.tokens, given.quick)
    served, base = given.place / "served", given.place / "base"
    moe.save_adapters(served, tokenizer=given.tokens)
    files = [given.engine.adapter(served / name, base) for name in moe.names]
    options = [part for file in files for part in ("--lora", str(file))]
    log, made = given.place / "adapters.log", {}
    with given.engine.serving(given.engine.model(base), log, "--alias", MODEL, *options) as engine:
        for case, mixture in (("adapters", False), ("mixture", True)):
            with proxied(served, engine, "llama.cpp", mixture=mixture) as proxy:
                made[case] = compared_adapters(
                    moe, given.dense, given.tokens, models.prompts(given.count),
                    partial(answered, proxy, engine, "moe"), mixture,
                )  # fmt: skip
    return made


def mixtral(given: Given) -> dict[str, Rows]:
    moe = models.upcycled(given.dense, given.tokens, given.quick)
    folder = given.place / "mixtral"
    moe.save_standard(folder, format="mixtral", tokenizer=given.tokens)
    log = given.place / "mixtral.log"
    with given.engine.serving(given.engine.model(folder), log) as engine:
        rows = []
        for task, text in models.prompts(given.count):
            ids = given.tokens(text)["input_ids"]
            answer = answered(engine, engine, MODEL, ids, text)
            rows.append(compared(task, ids, answer, moe, given.dense))
    return {"mixtral": rows}


def main() -> None:
    arguments = parser(__doc__)
    for name, what in (("--llama-server", "the program"), ("--llama-cpp", "its source folder")):
        arguments.add_argument(name, type=Path, required=True, help=what)
    arguments.add_argument(
        "--converter-python", type=Path, default=Path(sys.executable),
        help="Python with what llama.cpp's converters need",
    )  # fmt: skip
    said = arguments.parse_args()
    engine = LlamaCpp(said.llama_server, said.llama_cpp, said.converter_python.absolute())
    tokens, cases = models.tokenizer(), {}
    with tempfile.TemporaryDirectory() as made:
        dense, loss = models.dense(tokens, Path(made) / "base", said.quick)
        given = Given(engine, Path(made), dense, tokens, 10 if said.quick else 200, said.quick)
        for case in (adapters, mixtral):
            cases |= case(given)
    report(
        "serving_llama_cpp", cases, said.quick, engine={"llama.cpp": engine.version()},
        transformers=transformers.__version__, base_loss=loss,
    )  # fmt: skip


if __name__ == "__main__":
    main()
