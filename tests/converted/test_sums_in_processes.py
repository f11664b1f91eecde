"""The rows of an analytic router are those of all processes of a training."""

import socket
import subprocess
import sys
from pathlib import Path

import sums_in_processes as helper
import torch


def test_two_processes_solve_the_router_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(Path(helper.__file__))]
    processes = [
        subprocess.Popen([*command, str(r), str(port), str(tmp_path)], stderr=subprocess.PIPE)
        for r in range(2)
    ]
    errors = [p.communicate(timeout=300)[1].decode()[-2000:] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], errors
    moe = helper.converted()
    helper.train(moe, slice(None))
    want = helper.rows(moe.eval())
    assert not torch.equal(want[0], want[1])
    for name, found in torch.load(tmp_path / "found.pt").items():
        torch.testing.assert_close(found, want, rtol=0, atol=1e-6, msg=name)
