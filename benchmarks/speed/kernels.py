"""Every Triton kernel as its launches configure it, compiled ahead of time: no GPU is needed.

``python -m benchmarks.kernels [--quick]``: a table of registers, spills (bytes of stack), shared
memory and matrix units for sm_80 and sm_90. The list of builds is recorded from the launches
themselves, run on meta tensors, with Triton's own specialisation of their arguments.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from moe_rewrite.kernels import triton as shared

from .common import arguments, finish

SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may have (CUDA C++ guide, table 27)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NAMES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64",
    torch.int32: "i32",
}  # fmt: skip
META = torch.device("meta")


class Build(NamedTuple):
    """One kernel with one set of specialised arguments for one chip."""

    module: str
    kernel: str
    dtype: str
    arch: int
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    options: tuple[tuple[str, int], ...]

    def label(self) -> str:
        known = dict(self.constants)
        flags = [n.lower() for n, v in known.items() if v is True]
        sizes = "x".join(str(known[n]) for n in ("M", "N", "BLOCK") if n in known)
        return " ".join([self.kernel.removesuffix("_kernel"), sizes, *flags]).strip()


class Made(NamedTuple):
    """What the compiler made: per thread, and bytes a block."""

    registers: int
    spilled: int
    shared: int
    matrix_units: bool
    product: bool


def compile_build(build: Build) -> Made:
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(build.module), build.kernel)
    attributes = {(i,): [["tt.divisibility", 16]] for i in build.divisible}
    place = {name: i for i, (name, _) in enumerate(build.signature)}
    constants = {(place[name],): value for name, value in build.constants}
    source = ASTSource(function, dict(build.signature), constants, attributes)
    made: Any = triton.compile(
        source, target=GPUTarget("cuda", build.arch, 32),
        options=dict(build.options) | {"enable_fp_fusion": True},
    )  # fmt: skip
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = subprocess.run(
            [str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    used = {n: int(v) for n, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", found)}
    units = "wgmma.mma_async" in made.asm["ptx"] or "mma.sync" in made.asm["ptx"]
    spilled, product = used["STACK"] + used["LOCAL"], "tt.dot" in made.asm["ttir"]
    return Made(used["REG"], spilled, made.metadata.shared, units, product)


@contextmanager
def recorded(arch: int) -> Iterator[list[Build]]:
    """The builds of what is launched inside, as for a device of this capability."""
    from triton.runtime.jit import JITFunction

    builds: list[Build] = []

    def run(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        given = dict(zip(function.arg_names, args, strict=False)) | options
        builds.append(_specialised(function, given, arch))

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch("moe_rewrite.kernels.blocks.capability", lambda _: arch // 10),
    ):
        yield builds


def _specialised(function: Any, given: dict[str, Any], arch: int) -> Build:
    signature, constants, divisible = [], [], []
    for i, parameter in enumerate(function.params):
        value = given.pop(parameter.name)
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            kind = "constexpr"
            constants.append((parameter.name, value))
        elif isinstance(value, torch.Tensor):
            kind = "*" + NAMES[value.dtype]
            divisible.append(i)  # what PyTorch allocates begins at a multiple of 16 bytes
        else:
            kind = "i32" if abs(value) < 2**31 else "i64"
            divisible += [i] if value % 16 == 0 else []
        signature.append((parameter.name, kind))
    kinds = [kind[1:] for _, kind in signature if kind.startswith("*")]
    dtype = next((k for k in kinds if k in ("bf16", "fp16")), "fp32" if "fp32" in kinds else "int")
    return Build(
        function.fn.__module__, function.fn.__name__, dtype, arch, tuple(signature),
        tuple(constants), tuple(divisible), tuple(given.items()),
    )  # fmt: skip


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


Launch = Callable[[torch.dtype], None]
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


def builds(quick: bool, archs: tuple[int, ...] = (80, 90)) -> list[Build]:
    """Every different build of the launches, in their order; quick: all in bf16, large sizes else."""
    found: dict[Build, None] = {}
    for dtype in DTYPES:
        for arch in archs:
            with recorded(arch) as made:
                for launch in LARGE + ([] if quick and dtype != torch.bfloat16 else OTHERS):
                    launch(dtype)
            found |= dict.fromkeys(made)
    return list(found)


def faults(build: Build, made: Made) -> list[str]:
    """What a build must not be, in words."""
    wrong = []
    if made.spilled:
        wrong.append(f"spills {made.spilled} bytes")
    if made.shared > SHARED[build.arch]:
        wrong.append(f"{made.shared} bytes of shared memory, there are {SHARED[build.arch]}")
    if made.product and build.dtype != "fp32" and not made.matrix_units:
        wrong.append("a product without matrix units")
    return wrong


def left_out(todo: list[Build]) -> set[str]:
    """Kernels of the package that no build is of."""
    import importlib

    made: dict[str, set[str]] = {}
    for build in todo:
        made.setdefault(build.module, set()).add(build.kernel)
    every = {
        name
        for module in made
        for name in vars(importlib.import_module(module))
        if name.endswith("_kernel")
    }
    return every - set().union(*made.values())


def main() -> None:
    from rich.progress import track

    assert not shared.interpreted(), "TRITON_INTERPRET is set: nothing would be compiled"
    todo = builds(arguments(__doc__ or "").quick)
    assert not left_out(todo), f"no launch of {left_out(todo)}"
    made = [compile_build(build) for build in track(todo, "builds")]
    rows = [
        (f"sm_{b.arch}", b.dtype, b.label(), m.registers, m.spilled, m.shared,
         "yes" if m.matrix_units else "", ", ".join(faults(b, m)))
        for b, m in zip(todo, made, strict=True)
    ]  # fmt: skip
    columns = "chip", "dtype", "kernel", "registers", "spilled", "shared", "matrix units", "faults"
    figures = [
        {"kernel": b.label(), "dtype": b.dtype, "arch": b.arch, "faults": faults(b, m)}
        | m._asdict()
        for b, m in zip(todo, made, strict=True)
    ]
    finish("kernels", columns, rows, builds=figures)
    if wrong := [figure["kernel"] for figure in figures if figure["faults"]]:
        raise SystemExit(f"faults: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
