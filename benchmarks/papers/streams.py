"""Shared by the benchmarks over streams of tasks: resumable runs in a pool, and summaries."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch

from moe_rewrite.utils.atomic_files import write_json

from ..tools.report import mean_and_spread, read

Figures = dict[str, Any]
Spread = dict[str, float]


def runs(
    job: Callable[..., Figures], variants: Mapping[str, Figures], seeds: Sequence[int],
    root: Path | None = None, workers: int = 2,
) -> dict[str, list[Figures]]:  # fmt: skip
    """``job(folder, seed, **variant)`` of every variant under every seed, `workers` at a time.

    Folders are inside `root`, or MOE_REWRITE_RUNS, if that is set; a later start reads finished runs
    and resumes the others.
    """
    root = root or Path(os.environ.get("MOE_REWRITE_RUNS") or tempfile.mkdtemp())
    from rich.progress import track

    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = {
            (name, seed): pool.submit(_finished, job, root / f"{name}-{seed}", seed, variant)
            for seed in seeds
            for name, variant in variants.items()
        }
        found = {key: future.result() for key, future in track(jobs.items(), "runs")}
    return {name: [found[name, seed] for seed in seeds] for name in variants}


def _finished(job: Callable[..., Figures], folder: Path, seed: int, variant: Figures) -> Figures:
    file = folder / "figures.json"
    asked = json.loads(json.dumps(variant))
    if file.exists() and (done := json.loads(file.read_text()))["variant"] == asked:
        return done["figures"]
    torch.set_num_threads(1)
    figures = job(folder, seed, **variant)
    write_json(file, {"variant": asked, "figures": figures})
    return figures


def spread(values: Sequence[float]) -> Spread:
    return {"mean": mean(values), "spread": stdev(values) if len(values) > 1 else 0.0}


def losses(found: Sequence[Figures]) -> Figures:
    """Losses of runs that are scored by minus the loss: lower is better."""
    return {
        "loss": spread([-r["op"] for r in found]), "bwt": spread([r["bwt"] for r in found]),
        "base": spread([-r["base_after"] for r in found]),
        "base_before": spread([-r["base_before"] for r in found]),
        "frozen": spread([-mean(r["before"]) for r in found]),
    }  # fmt: skip


def others(found: Sequence[Figures], kind: str) -> Figures:
    """Another score after the last task: its mean over the tasks, and on the base task."""
    after = [r["other"][kind] for r in found]
    return {
        kind: spread([mean(a[:-1]) for a in after]),
        f"base {kind}": spread([a[-1] for a in after]),
    }


def accuracies(found: Sequence[Figures]) -> Figures:
    """Accuracies of runs that are scored by accuracy: higher is better."""
    return {
        "last": spread([r["op"] for r in found]), "bwt": spread([r["bwt"] for r in found]),
        "base": spread([r["base_after"] for r in found]),
        "base_before": spread([r["base_before"] for r in found]),
    }  # fmt: skip


def facts(found: Sequence[Figures]) -> Figures:
    """Facts on a method, apart from its scores."""
    first = found[0]
    return {
        "trainable": first["trainable"], "keeps_data": first["keeps_data"],
        "seconds": median(r["seconds"] for r in found), "R": [r["R"] for r in found],
        "router_use": first["router_use"],
    }  # fmt: skip


def rows(results: Mapping[str, Figures], keys: Sequence[str]) -> list[tuple[Any, ...]]:
    """A line of a table for each method: means and spreads, then facts."""
    return [
        (name, *(mean_and_spread(r[k]) for k in keys),
         r["trainable"], "yes" if r["keeps_data"] else "no", f"{r['seconds']:.0f} s")
        for name, r in results.items()
    ]  # fmt: skip


def tuned() -> dict[str, Any]:
    """What `benchmarks.tune.tuning` chose: ``rates`` by method, ``epochs`` and ``pool``."""
    found = read("tuning")
    assert found, "run benchmarks.tune.tuning before"
    return found["chosen"]


def without_matrices(results: Mapping[str, Figures]) -> Figures:
    return {name: {k: v for k, v in r.items() if k != "R"} for name, r in results.items()}
