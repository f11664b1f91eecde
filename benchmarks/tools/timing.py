"""Times of several functions, measured side by side in one run."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from operator import truediv
from statistics import mean, median, quantiles
from typing import Any

import torch

Run = Callable[[], Any]
Clock = Callable[[Run], float]


def wall(run: Run) -> float:
    """Milliseconds that pass."""
    return 1e3 * timed(run)[1]


def processor(run: Run) -> float:
    """CPU milliseconds of all threads, which do not depend on other programs."""
    start = time.process_time()
    run()
    return 1e3 * (time.process_time() - start)


def cuda(run: Run) -> float:
    """Milliseconds on the GPU, between two events of its stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def timed(run: Run) -> tuple[Any, float]:
    """(its result, seconds) of a function that runs only once."""
    start = time.perf_counter()
    given = run()
    return given, time.perf_counter() - start


class Times(dict[str, list[float]]):
    """Milliseconds of each function, by counted round."""

    def medians(self) -> dict[str, float]:
        return {name: median(times) for name, times in self.items()}

    def quartiles(self) -> dict[str, list[float]]:
        """[lower, upper] quartile of each: half of the rounds lie between them."""
        return {
            name: quantiles(times, method="inclusive")[::2] if len(times) > 1 else 2 * times
            for name, times in self.items()
        }

    def ratio(self, name: str, to: str) -> float:
        """The median of the rounds' ratios. The speed of a shared machine changes within seconds,
        which would affect a ratio of medians."""
        return median(map(truediv, self[name], self[to]))


def side_by_side(
    runs: Mapping[str, Run],
    rounds: int,
    *,
    warm: int = 2,
    seconds: float = 0.0,
    clock: Clock = wall,
    before: Callable[[str], Any] | None = None,
    again_below: float = 0.0,
    drop_above: float = math.inf,
) -> Times:
    """Every function runs once in every round, in a random order: the function that ran before
    affects a time.

    rounds, seconds: at least this many counted rounds, and as many as are needed for the counted
        calls to take this many seconds in total
    warm: rounds before these, which are not counted
    before: is called with the function's name before its turn, outside of the measurement
    again_below: a function whose last call took fewer milliseconds runs once more before the call
        that counts, since the other functions have left the caches cold
    drop_above: a function that takes more milliseconds, on average up to its first counted call,
        is not run again; the first function stays, since the others are compared with it
    """
    draw = random.Random(0)
    times = Times({name: [] for name in runs})
    left = list(runs)
    done, counted = 0, dict.fromkeys(runs, 0.0)
    while done < warm + rounds or sum(counted[name] for name in left) < 1e3 * seconds:
        for name in draw.sample(left, len(left)):
            if before is not None:
                before(name)
            if times[name] and times[name][-1] < again_below:
                runs[name]()
            times[name].append(clock(runs[name]))
            counted[name] += times[name][-1] if done >= warm else 0.0
        if done == warm:
            left = left[:1] + [name for name in left[1:] if mean(times[name]) <= drop_above]
        done += 1
    return Times({name: of[warm:] for name, of in times.items()})


def alone(run: Run, rounds: int, *, warm: int = 2, clock: Clock = wall) -> float:
    """Median milliseconds of one function that is compared with nothing."""
    return side_by_side({"": run}, rounds, warm=warm, clock=clock).medians()[""]
