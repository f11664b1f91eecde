"""What the benchmarks of real engines do themselves: start, stop, compare."""

import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks.serving.answers import by_task, gap
from benchmarks.serving.engines import asked, free_port, running

SERVER = """
import http.server, json, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        content = json.dumps(os.environ.get("ASKED_FOR")).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_an_engine_runs_within_its_environment_and_is_ended(tmp_path):
    port = free_port()
    command = [sys.executable, "-c", SERVER, str(port)]
    with running(command, port, tmp_path / "log", {"ASKED_FOR": "this"}) as url:
        assert asked(url, "/health")[0] == "this"
    with pytest.raises(ConnectionRefusedError):
        asked(url, "/health")


def test_an_engine_that_ends_says_why(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with (
        pytest.raises(SystemExit, match="no such model"),
        running(command, free_port(), tmp_path / "log", {}),
    ):
        raise AssertionError("it never answers")


def test_the_gap_is_where_answers_first_differ():
    seen = []

    def model(input_ids):
        seen.append(input_ids.tolist())
        return SimpleNamespace(logits=torch.tensor([[[0.0, 3.0, 1.0], [0.5, 2.0, 1.25]]]))

    assert gap(model, [7, 8], [2, 1, 0], [2, 2, 1]) == 0.75
    assert seen == [[[7, 8, 2]]]


def test_counts_are_by_task_and_over_all():
    rows = [
        {"task": "a", "choice": "x", "read": True, "same": True, "dense": False},
        {"task": "b", "choice": None, "read": True, "same": False, "dense": False, "gap": 0.5},
        {"task": "b", "choice": "x", "read": False, "same": True, "dense": True},
    ]
    made = by_task(rows)
    assert list(made) == ["a", "b", "all"]
    assert made["b"] == {
        "prompts": 2, "read": 1, "same": 1, "dense": 1, "chosen": {"x": 1}, "gaps": [0.5],
    }  # fmt: skip
    assert made["all"]["same"] == 2 and made["all"]["chosen"] == {"x": 2}
