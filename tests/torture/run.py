"""Run seeds: `python -m tests.torture.run --seed 0 --count 1500`.

Each seed runs in a child that is forked after the imports, with a limit of time, so that crashes and
hangs are outcomes. Ends with a table of outcomes and a line of JSON; exit code 1 if anything is
wrong or raw.
"""

import argparse
import json
import os
import select
import signal
import sys
import time
from collections import Counter

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import moe_rewrite

from .check import Outcome, check


def warm_up():
    """What the first capture imports and builds, once for all children."""
    torch.set_num_threads(1)
    layers = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
    moe_rewrite.convert(layers, split=1, example_inputs=torch.zeros(2, 4))


def forked(seed: int, limit: float) -> Outcome:
    """The outcome of a seed that runs in a child."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what torch.export logs of refusals
        with os.fdopen(write, "w") as pipe:
            pipe.write(json.dumps(check(seed).as_dict()))
        os._exit(0)
    os.close(write)
    text, end = b"", time.monotonic() + limit
    while (left := end - time.monotonic()) > 0:
        if select.select([read], [], [], left)[0]:
            piece = os.read(read, 65536)
            if not piece:
                break
            text += piece
    else:
        os.kill(child, signal.SIGKILL)
    os.close(read)
    _, status = os.waitpid(child, 0)
    if text.endswith(b"}"):
        return Outcome(**json.loads(text))
    reason = f"no end within {limit:.0f} s" if left <= 0 else f"the child ended with {status}"
    return Outcome(seed, "raw", "hang" if left <= 0 else "crash", reason, seconds=limit)


def outcomes(seeds, limit, console, log=None):
    found = []
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("seeds", total=len(seeds))
        for seed in seeds:
            outcome = forked(seed, limit)
            found.append(outcome)
            if log is not None:
                log.write(json.dumps(outcome.as_dict()) + "\n")
                log.flush()
            if outcome.kind in ("wrong", "raw"):
                console.print(f"{outcome.kind} {seed}: {outcome.detail[:600]}", markup=False)
            progress.advance(task)
    return found


def table(found):
    rows = Table("outcome", "seeds", "seconds each", title=f"{len(found)} seeds")
    names = Counter(name(o) for o in found)
    for key, count in sorted(names.items()):
        seconds = sum(o.seconds for o in found if name(o) == key) / count
        rows.add_row(key, str(count), f"{seconds:.1f}")
    return rows


def name(outcome):
    return f"{outcome.kind}: {outcome.error}" if outcome.error else outcome.kind


def summary(found):
    kinds = Counter(o.kind for o in found)
    followed = sum("experts followed" in o.notes for o in found)
    refused = Counter(o.error for o in found if o.kind == "refused")
    return {
        "seeds": len(found), "first": found[0].seed if found else None,
        "right": kinds["right"], "refused": dict(refused), "wrong": kinds["wrong"],
        "raw": kinds["raw"], "experts_followed": followed,
        "seconds": round(sum(o.seconds for o in found), 1),
    }  # fmt: skip


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=1500)
    parser.add_argument("--limit", type=float, default=120, help="seconds for one seed")
    parser.add_argument("--log", help="a file for every outcome as a line of JSON")
    given = parser.parse_args(arguments)
    console = Console()
    warm_up()
    log = open(given.log, "a") if given.log else None  # noqa: SIM115 (open until the end)
    found = outcomes(range(given.seed, given.seed + given.count), given.limit, console, log)
    console.print(table(found))
    print(json.dumps(summary(found)))
    return int(any(o.kind in ("wrong", "raw") for o in found))


if __name__ == "__main__":
    sys.exit(main())
