"""A script in several processes of torch.distributed."""

import socket
import subprocess
import sys


def run(script, what, world, folder):
    """Do this in several processes; returns their exit codes and the ends of what they printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, script, *map(str, (rank, world, port, folder, what))],
            stderr=subprocess.PIPE,
        )
        for rank in range(world)
    ]
    errors = [p.communicate(timeout=900)[1].decode()[-2000:] for p in processes]
    return [p.returncode for p in processes], errors
