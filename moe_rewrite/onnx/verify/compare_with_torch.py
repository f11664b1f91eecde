"""Compare an exported file in ONNX Runtime with PyTorch, on other calls than the traced one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import torch
from torch.utils import _pytree as pytree

from ...errors import EquivalenceError
from ...frontend.arguments import is_cache, split_static
from ...frontend.example_inputs import random_arguments
from ...frontend.tracing.trace_memory import release_memory
from ...ir.equivalence import compare, evaluating
from ..report import Check
from ..runtime.session import FRUGAL, open_session, run
from ..trace.dynamic_dims import zeros
from ..trace.functional import FunctionalModel
from ..trace.weights import ROWS
from .late_casts import late_casts
from .reread import view_with_values

if TYPE_CHECKING:
    from ...converted.model import MoEModel

BATCH = 2
SIZES = ((2, 4, 0), (1, 7, 3), (3, 3, 6))  # batch, length and past of the cases
OFF = -1e4  # router bias of an expert that gets no row


@dataclass
class Case:
    """One call to compare."""

    name: str
    leaves: list[torch.Tensor]
    state: list[torch.Tensor]


def check_file(path: Path) -> None:
    """The ONNX checker and strict shape inference, by path. Raises EquivalenceError."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # several kinds without a common base
        raise EquivalenceError(
            f"{path.name} is no valid ONNX model: {str(error).splitlines()[0]}: please report this"
        ) from error


def compare_with_torch(
    moe: MoEModel, functional: FunctionalModel, path: Path, stand_ins: dict[str, torch.Tensor],
    shared: dict[str, torch.Tensor],
) -> list[Check]:  # fmt: skip
    """Raises EquivalenceError if an output differs by more than the dtype's tolerance.

    stand_ins: dequantized values of quantized weights, with which PyTorch computes.
    shared: weights of the file that ONNX Runtime takes from memory.

    Afterwards `functional` and `shared` hold the last case's experts instead of the model's, so that
    only one of the two sets is in memory at a time.
    """
    _require_plain(moe, functional)
    cases = list(_cases(moe, functional))
    checks = _compared(moe, functional, path, cases, stand_ins, shared)
    release_memory()  # of that session: one session exists at a time
    replaced = _other_experts(functional)
    if replaced:
        _exchange(replaced, moe, functional, shared)
        last = replace(cases[len(SIZES) - 1], name=_others_name(functional))
        checks += _compared(moe, functional, path, [last], stand_ins | replaced, shared, replaced)
    return checks


def _compared(
    moe: MoEModel, functional: FunctionalModel, path: Path, cases: list[Case], stand_ins: dict[str, torch.Tensor],
    shared: dict[str, torch.Tensor], replaced: dict[str, torch.Tensor] | None = None,
) -> list[Check]:  # fmt: skip
    """Compare the cases in one session. replaced: replaces tensors of experts and router."""
    release_memory()
    checks, session = [], _opened(path, replaced or {}, shared, moe.dtype)
    for case in cases:
        release_memory()  # after opening the session, or the last case
        with torch.no_grad():
            want = functional(case.leaves, functional.tensors | stand_ins, case.state)
        names = dict(zip(functional.inputs, case.leaves, strict=True))
        state = zip(functional.past, case.state, strict=True)
        with _on_this_cpu():
            got = run(session, names | dict(state))
        release_memory()
        if not any(bool(t.isfinite().any()) for t in want):
            raise EquivalenceError(
                f"PyTorch itself gives no finite number ({case.name}): nothing can be proven. "
                "Check the model's weights, or export with verify=False"
            )
        report = compare(want, got, _mask(functional, case.leaves))
        if not report.equal:
            worst = [
                f"{n} {tuple(a.shape)} -> {tuple(b.shape)}"
                for n, a, b in zip(functional.outputs, want, got, strict=True)
                if not compare([a], [b]).equal
            ]
            raise EquivalenceError(
                f"ONNX Runtime differs from PyTorch by {report.max_error:.2e} ({case.name}; "
                f"{', '.join(worst[:3])}): nothing was written. Please report this model"
            )
        del got, want
        checks.append(Check(case.name, report.max_error, report.rms_error))
    return checks


def _exchange(
    replaced: dict[str, torch.Tensor],
    moe: MoEModel,
    functional: FunctionalModel,
    shared: dict[str, torch.Tensor],
) -> None:
    """Replace the model's experts by others, which frees their memory."""
    for held in (functional.tensors, shared):
        held.update({n: t for n, t in replaced.items() if n in held})
    for site in moe.expert_sites():
        site.forget()


def _opened(
    path: Path,
    replaced: dict[str, torch.Tensor],
    shared: dict[str, torch.Tensor],
    dtype: torch.dtype,
) -> Any:
    other = view_with_values(path, replaced) if replaced else nullcontext(path)
    with other as file, late_casts(file, dtype) as (graph, options), _on_this_cpu():
        return open_session(graph, None, options=options, shared=shared, **FRUGAL)


@contextmanager
def _on_this_cpu() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # ONNX Runtime's errors have no common base
        raise EquivalenceError(
            f"ONNX Runtime's CPU provider cannot run this file ({str(error).splitlines()[0]}): "
            "export with verify=False, and compare on a machine that has its kernels"
        ) from error


def _mask(functional: FunctionalModel, leaves: list[torch.Tensor]) -> Any:
    return (
        leaves[functional.inputs.index(functional.mask)]
        if functional.mask in functional.inputs
        else None
    )


def _require_plain(moe: MoEModel, functional: FunctionalModel) -> None:
    """Raise EquivalenceError unless `functional`, the reference of all cases, equals the model."""
    asked = {k: v for k, v in functional.arguments.items() if not is_cache(v)}
    arguments = random_arguments(asked, moe.host.vocabulary(), BATCH)
    given = iter(pytree.tree_leaves(split_static(arguments)[0]))
    leaves = [
        t.new_zeros(BATCH, t.shape[1], 0, t.shape[3]) if cached else next(given)
        for cached, t in zip(functional.cached, functional.example, strict=True)
    ]
    shown = [n for n in functional.outputs if not n.startswith("present")]
    with torch.no_grad(), evaluating(moe):
        want = [t for t in pytree.tree_leaves(moe(**arguments)) if isinstance(t, torch.Tensor)]
        got = functional(leaves, functional.tensors, functional.state(BATCH))
    report = compare(want[: len(shown)], got[: len(shown)], arguments.get(functional.mask or ""))
    if not report.equal:
        raise EquivalenceError(
            f"the function that is exported differs from the model by {report.max_error:.2e}: "
            "please report this model"
        )


def _cases(moe: MoEModel, functional: FunctionalModel) -> Iterator[Case]:
    for batch, length, past in SIZES:
        leaves = _leaves(functional, moe.host, batch, length, past)
        shape = tuple(leaves[0].shape)
        yield Case(f"inputs {shape}", leaves, _state(functional, batch, past))
    mask = _mask(functional, leaves)
    if mask is not None and mask.ndim == 2:
        padded = [t.clone() for t in leaves]
        _mask(functional, padded)[0, : mask.shape[1] // 2] = 0
        yield Case(f"inputs {shape}, left padding", padded, _state(functional, batch, past))


def _others_name(functional: FunctionalModel) -> str:
    more = ", one more than exported" if functional.stacks else ""
    idle = ", one of them idle" if functional.biased and functional.stacks else ""
    return f"other {'experts' if functional.stacks else 'router'}{more}{idle}"


def _leaves(
    functional: FunctionalModel, host: Any, batch: int, length: int, past: int
) -> list[torch.Tensor]:
    """Random leaves of these sizes."""
    leaves = dict(zip(functional.inputs, zeros(functional, batch, length, past), strict=True))
    return list(random_arguments(leaves, host.vocabulary(), batch).values())


def _state(functional: FunctionalModel, batch: int, past: int) -> list[torch.Tensor]:
    """Random running sums, as they could be after `past` positions."""
    if not functional.with_state:
        return []
    total, count = functional.state(batch)
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(total.shape, generator=generator) * past**0.5
    return [drawn, count + past]


def _other_experts(functional: FunctionalModel) -> dict[str, torch.Tensor]:
    """Random experts and a router with large logits, so that experts matter even if the model's own
    are still zero. If their number is dynamic, one more than there are, the last without rows."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape: list[int], size: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * size

    replaced = {}
    for name in (n for n in functional.tensors if n in functional.stacks or n == ROWS):
        tensor = functional.tensors[name]
        shape = list(tensor.shape)
        if name in functional.stacks:
            stack = functional.stacks[name]
            shape[stack.dim] += stack.each
        taps = tensor[0, 0].numel() if tensor.ndim > 1 else 1
        each = functional.stacks[name].each if name in functional.stacks else 1
        size = 2.0 * shape[1] ** -0.5 if name == ROWS else 0.1 / taps
        replaced[name] = draw(shape, size if name == ROWS else size / each**0.25).to(tensor)
    if ROWS in functional.stacks and functional.biased:
        replaced[ROWS][-1, -1] = OFF
    return replaced
