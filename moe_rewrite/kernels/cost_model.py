"""Cost model: the time of each execution of the routed work, from products, memory and calls.

Executions: ``"dense"``: every expert on every row, weighted by gates that may be zero (LoRA experts
are then one stacked product); ``"grouped"``: each expert on its own rows, gathered by the plan.
Sizes: T rows, D input width, O output width, H hidden width, E experts of rank r, k experts a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .lora.padded import MANY

Execution = Literal["dense", "grouped"]


@dataclass(frozen=True)
class Machine:
    """The speed of a machine.

    flops: FLOPs per second of wide products.
    numbers: fp32 numbers read or written per second.
    call: seconds of overhead of one operation.
    """

    flops: float
    numbers: float
    call: float

    def product(self, m: float, n: float, k: float) -> float:
        """Seconds of an (m, k) by (k, n) product: bound by arithmetic or by memory."""
        return self.call + max(2 * m * n * k / self.flops, self.moved(m * k + k * n + m * n))

    def moved(self, numbers: float) -> float:
        return numbers / self.numbers


# Medians of `python -m benchmarks.tune.costs` on 2 cores (x86-64, AVX-512). A choice depends on
# the ratios of these, which differ less between machines than their values do.
CPU = Machine(flops=9.4e10, numbers=6.9e9, call=8e-6)
TURN = 12  # operations of one LoRA expert, grouped
PADDED = 24  # operations of LoRA experts with few rows each, all together


def lora(
    machine: Machine, T: int, D: int, O: int, E: int, r: int, k: int,  # noqa: E741
) -> dict[Execution, float]:  # fmt: skip
    """Seconds of a forward pass after the base product."""
    R, busy = E * r, _busy(T, E, k)
    share = T * k / busy
    dense = machine.product(T, R, D) + machine.call + machine.moved(2 * T * R)
    dense += machine.product(T, O, R) + machine.moved(T * O)
    own = machine.product(share, r, D) + machine.product(share, O, r)
    own += (TURN - 2) * machine.call + machine.moved(share * (2 * D + 2 * r + 3 * O))
    grouped = busy * own
    if busy >= MANY:
        grouped = min(grouped, _padded(machine, busy, share, D, O, r))
    return {"dense": dense, "grouped": grouped}


def _padded(machine: Machine, busy: float, share: float, D: int, O: int, r: int) -> float:  # noqa: E741
    """Seconds of LoRA experts with `share` rows each, padded to the most that one has."""
    rows = busy * (share + 2 * share**0.5 + 1)
    seconds = PADDED * machine.call + 2 * rows * r * (D + O) / machine.flops
    return seconds + machine.moved(rows * (2 * D + 4 * r + 4 * O) + 3 * busy * r * (D + O))


def ffn(
    machine: Machine, T: int, D: int, H: int, E: int, k: float, products: int
) -> dict[Execution, float]:
    """Seconds of a forward pass; products: 3 with a gate, else 2."""
    times: list[float] = []
    busy = _busy(T, E, k)
    for rows, experts in ((float(T), float(E)), (T * k / busy, busy)):
        each = products * machine.product(rows, H, D) + machine.moved(2 * rows * H)
        times.append(experts * (each + 2 * machine.call))
    gathered = machine.call + machine.moved(3 * T * k * D)
    return {"dense": times[0] + machine.moved(T * E * D), "grouped": times[1] + gathered}


def _busy(T: int, E: int, k: float) -> float:
    """Mean number of experts with at least one of T > 0 rows, if rows choose at random."""
    return E * (1 - (1 - min(k / E, 1)) ** T)


def best(times: dict[Execution, float]) -> Execution:
    return min(times, key=lambda form: times[form])
