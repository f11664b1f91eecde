"""llama.cpp: its converters, its server, and a request to it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_rewrite.serve.proxy import CHOSEN

from .answers import NEW, Answer
from .engines import asked, free_port, running


@dataclass(frozen=True)
class LlamaCpp:
    """server: the program llama-server. source: the folder of the converters. python: runs them."""

    server: Path
    source: Path
    python: Path

    def converted(self, script: str, folder: Path, *options: str) -> Path:
        """A folder of transformers' or PEFT's as a GGUF file in float32."""
        made = folder.with_suffix(".gguf")
        command = [
            str(self.python), str(self.source / script), str(folder), "--outtype", "f32",
            "--outfile", str(made), *options,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{script}: {done.stderr[-4000:]}")
        return made

    def model(self, folder: Path) -> Path:
        return self.converted("convert_hf_to_gguf.py", folder)

    def adapter(self, folder: Path, base: Path) -> Path:
        return self.converted("convert_lora_to_gguf.py", folder, "--base", str(base))

    @contextmanager
    def serving(self, model: Path, log: Path, *options: str) -> Iterator[str]:
        """The address of a server of a GGUF file; keys and values in float32."""
        port = free_port()
        command = [
            str(self.server), "--model", str(model), "--host", "127.0.0.1", "--port", str(port),
            "--ctx-size", "256", "--parallel", "1", "--threads", "1", "--cache-type-k", "f32",
            "--cache-type-v", "f32", "--flash-attn", "off", *options,
        ]  # fmt: skip
        with running(command, port, log, {}) as url:
            yield url

    def version(self) -> str:
        command = [str(self.server), "--version"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return (done.stdout + done.stderr).strip().splitlines()[0]


def greedy_answer(url: str, model: str, ids: list[int], tokens: int = NEW) -> Any:
    """(the tokens, the headers) of an answer without the end of a text."""
    body = {
        "model": model, "prompt": ids, "max_tokens": tokens, "temperature": 0,
        "ignore_eos": True, "verbose": True, "return_tokens": True, "cache_prompt": False,
    }  # fmt: skip
    said, headers = asked(url, "/v1/completions", body)
    return said["__verbose"]["tokens"], headers


def answered(url: str, engine: str, model: str, ids: list[int], text: str) -> Answer:
    """url: of the engine or of a proxy before it. Ids are sent, since a converted tokenizer may read
    a text in another way: `prompt` says how."""
    tokens, headers = greedy_answer(url, model, ids)
    whole = {"content": text, "add_special": True, "parse_special": True}
    read, _ = asked(engine, "/tokenize", whole)
    return {"prompt": read["tokens"], "tokens": tokens, "choice": headers.get(CHOSEN)}
