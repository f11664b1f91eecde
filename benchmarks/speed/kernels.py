"""Every Triton kernel as its launches configure it, compiled ahead of time: no GPU is needed."""

# python -m benchmarks.speed.kernels [--quick]: a table of registers, spills (bytes of stack), shared
# memory and matrix units for sm_80 and sm_90. The list of builds is recorded from the launches
# themselves, run on meta tensors, with Triton's own specialisation of their arguments.

from __future__ import annotations

import importlib

import torch

from moe_rewrite.kernels import triton as shared

from ..tools.report import finish, is_quick, save
from .forms.kernel_builds import Build, Made, compile_build, recorded
from .forms.kernel_launches import LARGE, OTHERS

SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may have (CUDA C++ guide, table 27)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def builds(quick: bool, archs: tuple[int, ...] = (80, 90)) -> list[Build]:
    """Every distinct build of the launches, in order. quick: other types than bf16 on the newest chip
    alone, small sizes in bf16 there alone."""
    found: dict[Build, None] = {}
    for dtype in DTYPES:
        for arch in archs:
            if quick and dtype != torch.bfloat16 and arch != max(archs):
                continue
            with recorded(arch) as made:
                newest = dtype == torch.bfloat16 and arch == max(archs)
                for launch in LARGE + ([] if quick and not newest else OTHERS):
                    launch(dtype)
            found |= dict.fromkeys(made)
    return list(found)


def faults(build: Build, made: Made) -> list[str]:
    """What is wrong with a build, as text."""
    wrong = []
    if made.spilled:
        wrong.append(f"spills {made.spilled} bytes")
    if made.shared > SHARED[build.arch]:
        wrong.append(f"{made.shared} bytes of shared memory, there are {SHARED[build.arch]}")
    if made.product and build.dtype != "fp32" and not made.matrix_units:
        wrong.append("a product without matrix units")
    return wrong


def left_out(todo: list[Build]) -> set[str]:
    """Kernels of the package without a build."""
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
    quick = is_quick(__doc__)
    todo = builds(quick)
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
    if not quick:
        save("kernels", {"builds": figures})
    finish("kernels", columns, rows, builds=figures)
    if wrong := [figure["kernel"] for figure in figures if figure["faults"]]:
        raise SystemExit(f"faults: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
