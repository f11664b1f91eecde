"""Launches of every Triton kernel on meta tensors, with the sizes of benchmarks.speed.kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch

META = torch.device("meta")
Launch = Callable[[torch.dtype], None]


def launch_ffn(
    dtype: torch.dtype, rows: int, gated: bool, bias: bool, D: int, H: int, E: int
) -> None:
    """Forward and backward with about so many rows an expert."""
    from moe_rewrite.kernels.ffn import launch
    from moe_rewrite.kernels.ffn.cpu_plan import Gradients

    T = E * rows // 2

    def new(*size: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*size, dtype=kind, device=META)

    up, down, gate = new(E, H, D), new(E, D, H), new(E, H, D)
    lists = [[up], [down], [gate] if gated else []]
    biases = [new(E, H), new(E, H), new(E, D)]
    lists += (
        [[b] for b in biases]
        if bias and gated
        else [[biases[0]], [], [biases[2]]]
        if bias
        else [[], [], []]
    )
    plan = [new(n, kind=torch.int64) for n in (2 * T, E + 1, 2 * T)]
    x, gates = new(T, D), new(T, 2, kind=torch.float32)
    _, pre = launch.forward(x, gates, *plan, lists, "silu", save=True)
    into = Gradients(*(kind[0] if kind else [] for kind in lists))
    launch.backward(x, x, gates, *plan, pre, lists, "silu", True, True, into)


def launch_lora(dtype: torch.dtype, T: int, D: int, N: int, R: int) -> None:
    from moe_rewrite.kernels.lora import launch

    def new(*size: int) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=META)

    launch.low_rank(new(T, N), new(N, D).t(), new(T, R), new(R, D).t())


def launch_patches(dtype: torch.dtype, B: int, C: int, E: int, L: int, P: int, Q: int) -> None:
    from moe_rewrite.kernels.patches import launch

    x, patches = (torch.empty(*s, dtype=dtype, device=META) for s in ((B, C, Q), (E, B * L, C, P)))
    gates = torch.empty(B, E, L, device=META)
    picks, positions = (
        torch.empty(*s, dtype=torch.int64, device=META) for s in ((B, E, L), (Q // P + 1, P))
    )
    launch.gather(x, picks, positions)
    launch.gather(x, picks, positions, gates)
    launch.scatter(patches, gates, picks, positions, Q)
    launch.scatter(patches, None, picks, positions, Q)
    launch.gates_gradient(x, patches, picks, positions)


def launch_plan(dtype: torch.dtype, T: int, E: int, K: int) -> None:
    from moe_rewrite.kernels.plan import launch

    logits = torch.empty(T, E, dtype=dtype, device=META)
    for normalize in (True, False):
        gates, experts = launch.route(logits, K, normalize)
        launch.route_backward(gates, logits, gates, experts, normalize)
    launch.sort_plan(experts.flatten(), E)


LARGE: list[Launch] = [
    lambda d: launch_ffn(d, 2048, True, False, 4096, 2048, 64),
    lambda d: launch_lora(d, 8192, 4096, 4096, 128),
    lambda d: launch_plan(d, 8192, 64, 4),
    lambda d: launch_patches(d, 64, 128, 8, 4, 100, 3136),
]
OTHERS: list[Launch] = [
    *(
        (lambda d, r=rows, g=gated, D=D, H=H: launch_ffn(d, r, g, True, D, H, 256))
        # widths that no block divides, where rows begin at 16 values and where they do not
        for D, H in ((1008, 1456), (1000, 1496))
        for rows in (16, 32, 64, 128) for gated in (True, False)
    ),
    lambda d: launch_ffn(d, 2048, False, False, 4096, 2048, 64),
    lambda d: launch_ffn(d, 2048, True, True, 4096, 2048, 64),
    lambda d: launch_lora(d, 16, 1000, 1496, 3), lambda d: launch_lora(d, 64, 512, 512, 256),
    lambda d: launch_lora(d, 8192, 1008, 1456, 8), lambda d: launch_lora(d, 8192, 1000, 1496, 8),
    lambda d: launch_plan(d, 8192, 256, 256), lambda d: launch_plan(d, 1, 1, 1),
    lambda d: launch_patches(d, 3, 1, 1, 1, 1, 5),
    lambda d: launch_ffn(d, 1, True, True, 24, 40, 1),
]  # fmt: skip
