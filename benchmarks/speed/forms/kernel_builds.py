"""Triton kernels as a launch specialises them, and what the compiler makes of them."""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

NAMES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64",
    torch.int32: "i32",
}  # fmt: skip


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


@contextmanager
def recorded(arch: int) -> Iterator[list[Build]]:
    """The builds of the kernels that are launched inside, for a device of this capability."""
    from triton.runtime.jit import JITFunction

    builds: list[Build] = []

    def run(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        given = dict(zip(function.arg_names, args, strict=False)) | options
        builds.append(_specialised(function, given, arch))

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch("moe_rewrite.kernels.tile_sizes.capability", lambda _: arch // 10),
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


class Made(NamedTuple):
    """What the compiler made: per thread, and bytes a block."""

    registers: int
    spilled: int
    shared: int
    matrix_units: bool
    product: bool


def compile_build(build: Build) -> Made:
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
