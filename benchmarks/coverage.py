"""Which families of transformers, and of timm where it is installed, convert and behave as they
should: tiny random models.

Each is converted in the middle and checked: outputs at other sizes, generated tokens, a training
step, `expand`, saving and loading.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import moe_rewrite
from moe_rewrite import LoRAExperts, MoeRewriteError, PatchRouter
from moe_rewrite.errors import InputError
from moe_rewrite.frontend.choose_host import host_of
from moe_rewrite.frontend.example_inputs import random_arguments

from .tools import timm_models
from .tools.report import commit, finish, parser, read, save
from .tools.tiny_models import build, families

SECONDS, MEMORY = 300, 8 << 30  # for one model; sizes that no rule makes small would take more
PASSED, NOT_BUILT = "passes", "does not build"
STARTING = threading.Lock()


def check(kind: Any) -> str:
    """PASSED, or what failed."""
    try:
        model = build(kind, _run) if isinstance(kind, type) else kind()
        example = host_of(model).arguments(None)
    except (Exception, MemoryError) as error:  # a tiny configuration that the class does not take
        return f"{NOT_BUILT}: {type(error).__name__}: {_first_line(error)}"
    step = ""
    try:
        for name, run in _steps(model, example).items():
            step = name
            run()
    except MoeRewriteError as error:
        return f"{step}: {type(error).__name__}: {_first_line(error)}"
    except Exception as error:
        return f"{step}: raw {type(error).__name__}: {_first_line(error)}"
    return PASSED


@torch.no_grad()
def _run(model: nn.Module) -> None:
    model(**host_of(model).arguments(None))


def _steps(model: nn.Module, example: dict[str, Any]) -> dict[str, Callable[[], None]]:
    """What is checked, in order; each raises where it fails."""
    of: dict[str, Any] = {}
    host = host_of(model)

    def convert() -> None:
        of["moe"] = moe_rewrite.convert(model, split=0.5, experts=LoRAExperts(rank=2))

    def other_sizes() -> None:
        for batch, length in ((1, 5), (4, 13)):
            given = resized(example, host, batch, length)
            with torch.no_grad():
                dense = model(**given)
            report = moe_rewrite.verify(model, of["moe"], given)
            assert report.equal, f"{report} for {type(dense).__name__}"
        if (larger := of_larger_images(example)) is None:
            return
        try:
            with torch.no_grad():
                model(**larger)
        except Exception:  # a model of one size
            return
        try:
            report = moe_rewrite.verify(model, of["moe"], larger)
        except InputError:  # flat features of patches are of one size, as the error says
            pooled = moe_rewrite.convert(
                model, split=0.5, router=PatchRouter(features="pooled"), experts=LoRAExperts(rank=2)
            )
            report = moe_rewrite.verify(model, pooled, larger)
        assert report.equal, f"{report} for larger images"

    def generate() -> None:
        if not getattr(host, "is_causal_lm", False):
            return
        given = resized(example, host, 2, 5)
        greedy = {"do_sample": False, "pad_token_id": 0, "min_new_tokens": 4, "max_new_tokens": 4}
        own = {k: v for k, v in given.items() if k != "use_cache"} | greedy
        try:  # with the cache that the configuration asks for and without, which are not equal for all
            texts = [model.generate(**own, use_cache=kept) for kept in (None, False)]
        except Exception:  # of other inputs, or not at all
            return
        said = of["moe"].generate(**own)
        assert any(torch.equal(said, text) for text in texts), "other tokens"

    def train() -> None:
        moe = of["moe"]
        given = resized(example, host, 2, 9)
        before = _outputs(moe, given)
        moe.train()
        torch.manual_seed(0)
        loss = sum(t.float().square().mean() for t in _floats(moe(**given)) if t.requires_grad)
        assert isinstance(loss, torch.Tensor), "no output requires a gradient"
        loss.backward()
        parameters = [p for p in moe.trainable_parameters() if p.grad is not None]
        assert any(bool(p.grad.any()) for p in parameters), "every gradient is zero"
        torch.optim.SGD(parameters, 1.0).step()
        for site in moe.expert_sites():
            for p in site.parameters():
                nn.init.normal_(p, std=0.2)
        after = _outputs(moe.eval(), given)
        assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)), (
            "experts change nothing"
        )

    def expand() -> None:
        moe, given = of["moe"], resized(example, host, 2, 9)
        before = _outputs(moe, given)
        moe.expand(1)
        assert all(map(torch.equal, before, _outputs(moe, given))), "expand() changed an output"

    def save_and_load() -> None:
        moe, given = of["moe"], resized(example, host, 2, 9)
        with tempfile.TemporaryDirectory() as folder:
            moe.save_pretrained(folder)
            again = moe_rewrite.load(folder, model)
        same = map(torch.equal, _outputs(moe, given), _outputs(again, given))
        assert all(same), "loaded, it gives other outputs"

    return {
        "convert": convert, "other sizes": other_sizes, "generate": generate, "train": train,
        "expand": expand, "save and load": save_and_load,
    }  # fmt: skip


def resized(example: dict[str, Any], host: Any, batch: int, length: int) -> dict[str, Any]:
    """Random arguments of the example's form for other sizes; images keep theirs."""

    def fit(t: Any) -> Any:
        of_text = isinstance(t, torch.Tensor) and t.ndim == 2 and not t.is_floating_point()
        return t.new_ones(t.shape[0], length) if of_text else t

    return random_arguments(
        {name: fit(t) for name, t in example.items()}, min(host.vocabulary(), 90), batch
    )


def of_larger_images(example: dict[str, Any]) -> dict[str, Any] | None:
    """Random arguments whose images are larger; None without images."""
    images = [n for n, t in example.items() if isinstance(t, torch.Tensor) and t.ndim == 4]
    larger = {
        n: torch.zeros(*example[n].shape[:2], *(s + 32 for s in example[n].shape[2:]))
        for n in images
    }
    return random_arguments({**example, **larger}, 2) if images else None


def _floats(output: Any) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves(output)
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]


@torch.no_grad()
def _outputs(moe: Any, given: dict[str, Any]) -> list[torch.Tensor]:
    return [t.nan_to_num() for t in _floats(moe(**given))]  # large random experts overflow some


def _first_line(error: BaseException) -> str:
    text = str(error).replace(f"{sys.prefix}/", "")  # no paths of this machine
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[0][:200] if lines else ""


def _child(kind: Any, answer: Any) -> None:
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    answer.send(check(kind))


def in_a_process(kind: Any, seconds: int = SECONDS) -> str:
    """`check` in a forked process, so that neither a crash nor a hang ends the run."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    child = fork.Process(target=_child, args=(kind, theirs))
    with STARTING:  # a child would wait for ever for an import that another thread was in
        child.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(seconds) else f"more than {seconds} s"
    except EOFError:
        return "the process died"
    finally:
        if child.is_alive():
            os.kill(child.pid or 0, signal.SIGKILL)
        child.join()


def run(chosen: Iterable[tuple[str, str, Any]], jobs: int) -> dict[str, dict[str, str]]:
    """{task: {name of the class: outcome}}."""
    from rich.progress import track

    found: dict[str, dict[str, str]] = {}
    chosen = list(chosen)
    with ThreadPoolExecutor(jobs) as pool:
        outcomes = pool.map(lambda family: in_a_process(family[2]), chosen)
        pairs = zip(chosen, outcomes, strict=True)
        for (task, kind, _), outcome in track(pairs, "families", len(chosen)):
            found.setdefault(task, {})[kind] = outcome
    return found


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--only", nargs="*", help="names of classes, run again")
    arguments.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    start, chosen = time.perf_counter(), [*families(), *timm_models.families()]
    if given.only:
        chosen = [f for f in chosen if f[1] in given.only]
    elif given.quick:
        chosen = chosen[::80]
    found = run(chosen, given.jobs)
    seconds = time.perf_counter() - start
    if given.only:
        _save_again(found)
    elif not given.quick:
        figures = {"figures": counts(found), "outcomes": found, "seconds": seconds}
        save("coverage", _versions() | figures)
    rows, figures = [], counts(found)
    for task, outcomes in found.items():
        of = figures[task]
        rows.append((task, "all", f"{of['passed']} of {of['built']}; {of['families']} in all"))
        rows += [(task, kind, outcome) for kind, outcome in _failed(outcomes).items()]
    finish("coverage", ["task", "family", "outcome"], rows, figures=figures, seconds=seconds)


def _versions() -> dict[str, str]:
    return {p: version(p) for p in ("transformers", "timm") if find_spec(p) is not None}


def _failed(outcomes: dict[str, str]) -> dict[str, str]:
    return {k: o for k, o in outcomes.items() if o != PASSED and not o.startswith(NOT_BUILT)}


def counts(found: dict[str, dict[str, str]]) -> dict[str, dict[str, int]]:
    """Families of each task: those that pass, those that build, all."""
    return {
        task: {
            "passed": sum(o == PASSED for o in outcomes.values()),
            "built": sum(not o.startswith(NOT_BUILT) for o in outcomes.values()),
            "families": len(outcomes),
        }
        for task, outcomes in found.items()
    }


def _save_again(found: dict[str, dict[str, str]]) -> None:
    """Put the outcomes of classes that were run by name into the results of the last whole run,
    with the commit at which each ran."""
    kept = read("coverage")
    if kept is None:
        return
    again = kept.get("again", {})
    for task, outcomes in found.items():
        kept["outcomes"][task] |= outcomes
        again |= dict.fromkeys(outcomes, commit())
    save("coverage", kept | {"figures": counts(kept["outcomes"]), "again": again})


if __name__ == "__main__":
    main()
