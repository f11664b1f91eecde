"""A proxy between OpenAI's clients and an engine: it chooses the adapter, and forwards."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from ..errors import ConfigError, InputError
from .facts import BASE
from .requests import requested, require_engine
from .router import AdapterRouter

PATHS = ("/v1/completions", "/v1/chat/completions")
LARGEST = 64 << 20  # bytes of a request
CONNECTING = 10  # seconds to reach the engine; it may take any time to answer
PASSED_ON = ("authorization", "accept", "user-agent", "x-request-id")
CHOSEN = "X-MoE-Rewrite-Adapter"  # header of an answer: the name that was chosen


class Refused(Exception):
    """A request that is answered by the proxy itself."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Proxy(ThreadingHTTPServer):
    """An OpenAI-compatible server; a thread a connection.

    A request whose `model` is `name` gets the adapter that the router chooses; with `mixture`, all
    with their gates. One that names an adapter, or the frozen model, gets that.
    """

    daemon_threads = True

    def __init__(
        self, router: AdapterRouter, url: str, engine: str = "vllm", *, base: str | None = None,
        name: str = "moe", mixture: bool = False, host: str = "127.0.0.1", port: int = 8080,
    ) -> None:  # fmt: skip
        """url: of the engine, such as ``http://127.0.0.1:8000``. engine: ``"vllm"``, ``"sglang"`` or
        ``"llama.cpp"``. base: the frozen model's name there; None: as the folder says. port: 0
        takes a free one. Raises ConfigError for a wrong value, OSError for a port in use."""
        require_engine(engine, mixture)
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"url={url!r}: expected one such as http://127.0.0.1:8000")
        base = base or router.base
        if not base:
            raise ConfigError("base=None: the folder does not say the frozen model's name: pass it")
        if name in (base, BASE, *router.names):
            raise ConfigError(f"name={name!r}: the engine has a model of this name; choose another")
        self.router, self.url, self.engine, self.base = router, parts, engine, base
        self.name, self.mixture = name, mixture
        super().__init__((host, port), _Handler)

    def models(self) -> dict[str, Any]:
        """What ``GET /v1/models`` answers."""
        names = [self.name, self.base, *self.router.names]
        return {"object": "list", "data": [{"id": n, "object": "model"} for n in names]}

    def forwarded(self, path: str, body: Any) -> tuple[dict[str, Any], str]:
        """(the request for the engine, the name that was chosen). Raises Refused."""
        if not isinstance(body, dict):
            raise Refused(400, "the body: expected a JSON object")
        model = body.get("model", self.name)
        names = self.router.names
        if model == self.name:
            weights = self._weights(path, body)
        elif isinstance(model, str) and model in (self.base, BASE, *names):
            weights = {BASE if model == self.base else model: 1.0}
        else:
            known = ", ".join([self.name, self.base, *names])
            raise Refused(404, f"model {model!r}: expected one of {known}")
        chosen = max(weights, key=lambda n: weights[n])
        return requested(body, weights, self.engine, self.base, names), chosen

    def _weights(self, path: str, body: Mapping[str, Any]) -> dict[str, float]:
        prompt = _prompt(path, body)
        try:
            weights = self.router.weights(prompt)
        except InputError as error:
            raise Refused(400, str(error)) from None
        return weights if self.mixture else {max(weights, key=lambda n: weights[n]): 1.0}

    def connection(self) -> http.client.HTTPConnection:
        """To the engine. Raises Refused if it does not answer."""
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        made = kinds[self.url.scheme](self.url.hostname or "", self.url.port, timeout=CONNECTING)
        try:
            made.connect()
        except OSError as error:
            raise self.down(error) from None
        made.sock.settimeout(None)
        return made

    def down(self, error: Exception) -> Refused:
        return Refused(502, f"the engine at {self.url.geturl()} does not answer ({error})")


def _prompt(path: str, body: Mapping[str, Any]) -> Any:
    """What the router reads of a request. Raises Refused."""
    if path == "/v1/chat/completions":
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise Refused(400, "messages: expected a list of at least one")
        if not all(isinstance(m, dict) for m in messages):
            raise Refused(400, "messages: expected objects with role and content")
        return messages
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > 1:
            raise Refused(400, f"{len(prompt)} prompts: they may get different adapters; send one")
        prompt = prompt[0]
    if not isinstance(prompt, str | list) or not prompt:
        raise Refused(400, "prompt: expected a text or a list of token ids")
    return prompt


class _Handler(BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *given: Any) -> None:
        """Prompts and clients are nobody's business."""

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._answer(200, self.server.models())
        else:
            self._refuse(Refused(404, f"{self.path}: expected /v1/models or {', '.join(PATHS)}"))

    def do_POST(self) -> None:
        try:
            body = self._body()
            if self.path not in PATHS:
                raise Refused(404, f"{self.path}: expected one of {', '.join(PATHS)}")
            self._forward(*self.server.forwarded(self.path, body))
        except Refused as refused:
            self._refuse(refused)
        except ConnectionError:  # the client is gone
            self.close_connection = True

    def _body(self) -> Any:
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            self.close_connection = True
            raise Refused(411, "Content-Length: expected the number of bytes") from None
        if not 0 <= length <= LARGEST:
            self.close_connection = True
            raise Refused(413, f"{length} bytes, expected at most {LARGEST}")
        try:
            return json.loads(self.rfile.read(length))
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is no JSON ({error})") from None

    def _forward(self, body: dict[str, Any], chosen: str) -> None:
        headers = {k: v for k, v in self.headers.items() if k.lower() in PASSED_ON}
        engine = self.server.connection()
        try:
            path = self.server.url.path.rstrip("/") + self.path
            headers["Content-Type"] = "application/json"
            engine.request("POST", path, json.dumps(body).encode(), headers)
            answer = engine.getresponse()
        except (OSError, http.client.HTTPException) as error:
            engine.close()
            raise self.server.down(error) from None
        try:
            self._pass_back(answer, chosen)
        finally:
            engine.close()  # which ends a generation that nobody waits for

    def _pass_back(self, answer: http.client.HTTPResponse, chosen: str) -> None:
        """Status, type and content as they come. If the engine stops in the middle, the answer is
        left without its end, which clients notice."""
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.getheader("Content-Type", "application/json"))
        self.send_header(CHOSEN, chosen)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        missing = answer.length or 0
        try:
            while piece := answer.read1(1 << 16):
                missing -= len(piece)
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            if missing > 0:
                raise http.client.IncompleteRead(b"", missing)
        except http.client.HTTPException:
            self.close_connection = True
            return
        self.wfile.write(b"0\r\n\r\n")

    def _refuse(self, refused: Refused) -> None:
        kind = "invalid_request_error" if refused.status < 500 else "engine_error"
        error = {"message": str(refused), "type": kind, "code": refused.status}
        self._answer(refused.status, {"error": error})

    def _answer(self, status: int, said: dict[str, Any]) -> None:
        content = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
