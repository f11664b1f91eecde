"""Run several methods over the same stream."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from torch import nn

from ..errors import ConfigError
from ..utils.folders import locked, require_writable
from .problem import Problem
from .registry import Setup
from .results import Result, comparison_table, matrix_table, write_results
from .run import run
from .tasks import Task


def compare(
    methods: Sequence[str],
    dense: nn.Module,
    problem: Problem,
    tasks: Sequence[Task],
    setup: Setup,
    base_task: Task | None = None,
    score: str = "accuracy",
    out: Path | None = None,
    json_file: Path | None = None,
) -> dict[str, Result]:
    """Run the methods one after the other, print their scores, and write the results so far.

    methods: names in `registry.METHODS`.
    out: folder of tables, pictures, and a folder for each method's run, which can be resumed.
    json_file: file of the figures.

    Other arguments and errors as for `run`.
    """
    if json_file is not None:
        require_writable(json_file.parent)
        if json_file.is_dir():
            raise ConfigError(f"{json_file}: is a folder: expected the name of a file")
    results = {}
    with nullcontext() if out is None else locked(out):
        for method in methods:
            folder = None if out is None else out / method
            results[method] = run(method, dense, problem, tasks, setup, base_task, score, folder)
            print(matrix_table(method, results[method]))
            write_results(results, out, json_file)
    print(comparison_table(results))
    return results
