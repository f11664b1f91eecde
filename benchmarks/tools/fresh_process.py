"""One measurement in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

Task = Callable[..., Any]


def in_fresh_process(task: Task, *given: Any) -> Any:
    """``task(*given)`` in a fresh process of the task's own module, whose main() calls `answer`.

    Peak memory is a figure of a whole process, and the addresses of memory change all times of a
    process: measurements for which this matters run in a fresh process.
    """
    module = task.__module__
    if module == "__main__":  # its name as given to python -m
        module = sys.modules[module].__spec__.name  # type: ignore[union-attr]
    asked = [value if isinstance(value, str) else json.dumps(value) for value in given]
    done = subprocess.run(
        [sys.executable, "-m", module, "--task", task.__name__, *asked],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def answer(*tasks: Task) -> bool:
    """Whether this process is one of `in_fresh_process`; then the task is run here and its result
    printed."""
    if "--task" not in sys.argv:
        return False
    name, *given = sys.argv[sys.argv.index("--task") + 1 :]
    task = next(t for t in tasks if t.__name__ == name)
    print(json.dumps(task(*map(_value, given))))
    return True


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:  # a string, which goes as it is
        return text
