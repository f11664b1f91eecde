"""Every benchmark in its quick form, two at a time."""

# python -m benchmarks.quick [NAME...] [--jobs N]: names such as speed.decode; default: all that need
# neither a GPU nor minutes. Each runs in a process of its own, forked after the imports that they share;
# its output is printed when it ends. Exits with 1 if one failed or took more than 15 minutes.

from __future__ import annotations

import argparse
import faulthandler
import importlib
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO

LIMIT = 900  # seconds
HERE = Path(__file__).parent
ELSEWHERE = {
    "papers.carving": "36 s",
    "papers.carving_balance": "its small form says nothing",
    "papers.carving_distilled": "its small form says nothing",
    "papers.demonstration": "tests/demo runs it",
    "speed.decode_compiled": "compiles for minutes",
    "speed.onnx_gpu": "needs a GPU",
    "speed.onnx_memory": "minutes",
    "speed.scaling": "minutes",
}
OPTIONS = {"coverage": ["--jobs", "1"]}
FRESH = ("speed.gpu", "speed.gpu_lora", "speed.kernels")  # set Triton's mode before it is imported
SHARED = ("torch", "transformers.models.llama.modeling_llama", "moe_rewrite", "moe_rewrite.convert")


@dataclass
class Running:
    name: str
    process: BaseProcess
    output: IO[str]
    start: float

    def ended(self) -> bool:
        if self.process.is_alive() and time.monotonic() - self.start > LIMIT + 30:
            self.process.kill()
        self.process.join(timeout=0.1)
        return not self.process.is_alive()

    def report(self) -> bool:
        self.output.seek(0)
        print(self.output.read(), end="")
        seconds, code = time.monotonic() - self.start, self.process.exitcode
        print(f"= {self.name}: {code} after {seconds:.0f} s", flush=True)
        return code == 0


def names() -> Iterator[str]:
    yield "coverage"
    for folder in ("speed", "papers", "tune"):
        for file in sorted((HERE / folder).glob("[!_]*.py")):
            name, runs = f"{folder}.{file.stem}", "__main__" in file.read_text()
            if runs and name not in ELSEWHERE:
                yield name


def run(name: str, output: IO[str]) -> None:
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    module, options = f"benchmarks.{name}", ["--quick", *OPTIONS.get(name, [])]
    if name in FRESH:
        os.execv(sys.executable, [sys.executable, "-m", module, *options])
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    sys.argv = [name, *options]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def start(name: str) -> Running:
    output = tempfile.TemporaryFile("w+")  # noqa: SIM115
    process = get_context("fork").Process(target=run, args=(name, output))
    process.start()
    return Running(name, process, output, time.monotonic())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(names()))
    parser.add_argument("--jobs", type=int, default=2)
    asked = parser.parse_args()
    for module in SHARED:  # nothing is computed here: a fork has no threads of its parent
        importlib.import_module(module)
    waiting, running, right = list(asked.names), [], []
    while waiting or running:
        while waiting and len(running) < asked.jobs:
            running.append(start(waiting.pop(0)))
        for one in [r for r in running if r.ended()]:
            running.remove(one)
            right.append(one.report())
    sys.exit(not all(right))


if __name__ == "__main__":
    main()
