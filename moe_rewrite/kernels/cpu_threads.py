"""Divide work into shares, each computed by one CPU core alone.

A product on one core takes less core time than its part of a product that all cores compute
together, and memory-bound passes of one share overlap with products of another.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import torch

_pools: dict[int, ThreadPoolExecutor] = {}
_starting = threading.Lock()


def spread(work: Callable[[int], None], shares: int) -> None:
    """Run ``work(0)`` to ``work(shares - 1)`` in parallel, without gradients and in the caller's
    inference mode; a single share runs in the caller's thread. Returns when all have finished, and
    raises the first error."""
    if shares == 1:
        return work(0)
    mode = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad

    def share(i: int) -> None:
        with mode():
            work(i)

    running = [_pool(shares).submit(share, i) for i in range(shares)]
    wait(running)
    for done in running:
        done.result()


def _pool(size: int) -> ThreadPoolExecutor:
    with _starting:
        if size not in _pools:
            threads = torch.get_num_threads()
            pool, all_started = (
                ThreadPoolExecutor(size, "moe_rewrite", _alone),
                threading.Barrier(size),
            )
            wait([pool.submit(all_started.wait) for _ in range(size)])
            torch.set_num_threads(threads)  # a thread's setting also becomes new threads' default
            _pools[size] = pool
        return _pools[size]


def _alone() -> None:
    """Make this thread compute its products alone."""
    torch.get_num_threads()  # the first call in a thread reads the default
    torch.set_num_threads(1)


def _forget() -> None:
    """A forked process has none of its parent's threads."""
    global _starting
    _pools.clear()
    _starting = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
