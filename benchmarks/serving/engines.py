"""Engines that are started for a benchmark, in an environment of their own, and stopped after it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STARTING = 600  # seconds that an engine may take until it answers
STOPPING = 60
NOT_PASSED_ON = ("PYTHONPATH", "VIRTUAL_ENV")  # an engine has packages of its own


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def vllm(python: Path, model: Path, log: Path, *options: str) -> Iterator[str]:
    """The address of a vLLM that serves a model in float32. python: of its environment."""
    port = free_port()
    command = [
        str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager",
        "--max-model-len", "256", "--max-num-seqs", "2", *options,
    ]  # fmt: skip
    own = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        "PATH": f"{python.parent}:{os.environ['PATH']}",
    }  # fmt: skip
    with running(command, port, log, own) as url:
        yield url


@contextmanager
def running(
    command: Sequence[str], port: int, log: Path, environment: dict[str, str]
) -> Iterator[str]:
    """The address of a server that answers; it and all that it started are ended after that."""
    own = {k: v for k, v in os.environ.items() if k not in NOT_PASSED_ON} | environment
    with log.open("w") as file:
        # a session of its own: an engine's workers end with it
        engine = subprocess.Popen(
            command, env=own, stdout=file, stderr=file, start_new_session=True
        )
    try:
        _wait(engine, port, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        _stop(engine)


def _wait(engine: subprocess.Popen, port: int, log: Path) -> None:
    until = time.monotonic() + STARTING
    while time.monotonic() < until:
        if engine.poll() is not None:
            raise SystemExit(f"{engine.args[0]} ended:\n{log.read_text()[-4000:]}")  # type: ignore[index]
        if _is_healthy(port):
            return
        time.sleep(0.5)
    raise SystemExit(f"no answer after {STARTING} s:\n{log.read_text()[-4000:]}")


def _is_healthy(port: int) -> bool:
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        client.request("GET", "/health")
        return client.getresponse().status == 200
    except OSError:
        return False
    finally:
        client.close()


def _stop(engine: subprocess.Popen) -> None:
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(engine.pid, sent)
        except ProcessLookupError:
            return
        try:
            engine.wait(STOPPING)
        except subprocess.TimeoutExpired:
            continue


def asked(url: str, path: str, body: Any = None) -> tuple[Any, Any]:
    """(what an address answers, its headers): a POST of a body, or a GET without one."""
    host, port = url.removeprefix("http://").split(":")
    client = http.client.HTTPConnection(host, int(port), timeout=300)
    given = None if body is None else json.dumps(body)
    client.request(
        "GET" if body is None else "POST", path, given, {"Content-Type": "application/json"}
    )
    answer = client.getresponse()
    said = json.loads(answer.read())
    client.close()
    if answer.status != 200:
        raise SystemExit(f"{path}: {answer.status} {said}")
    return said, answer.headers


def versions(python: Path, *names: str) -> dict[str, str]:
    """Of packages of another environment."""
    code = (
        "import json, sys; from importlib.metadata import version; "
        "print(json.dumps({n: version(n) for n in sys.argv[1:]}))"
    )
    done = subprocess.run([python, "-c", code, *names], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)
