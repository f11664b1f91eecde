"""Graph equivalence: the converted model against the dense one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .capture import as_arguments, is_hf, split_static
from .errors import EquivalenceError

# The graph runs the captured operations in order ("exact"), but eager attention may choose another
# kernel where capture wrote the mask out; a wrong graph is off by orders of magnitude more.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class EquivalenceReport:
    """equal: within tolerance everywhere that counts. exact: bit for bit. max_error, rms_error:
    over all outputs, relative to the dense output's largest value. shapes: inputs compared."""

    equal: bool
    exact: bool
    max_error: float
    rms_error: float
    shapes: tuple[str, ...] = ()

    def __str__(self) -> str:
        word = "exactly equal" if self.exact else "equal" if self.equal else "DIFFERENT"
        error = f"max error {self.max_error:.2e}, rms {self.rms_error:.2e}"
        return f"{word} ({error}) on {', '.join(self.shapes) or 'one call'}"


def verify(model: nn.Module, moe: nn.Module, inputs: Any) -> EquivalenceReport:
    """Run both models in eval mode on these inputs (tensor, tuple or dict) and compare outputs.

    Positions that an attention_mask leaves out do not count. Both models keep their mode.
    """
    arguments = as_arguments(model, inputs)
    if is_hf(model):
        from .hf import is_causal_lm

        if is_causal_lm(model):  # caches hold intermediate values, in layouts of their own
            arguments.setdefault("use_cache", False)
    outputs = []
    for module in (model, moe):
        training = module.training
        try:
            with torch.no_grad():
                module.eval()
                outputs.append(pytree.tree_leaves(module(**arguments)))
        finally:
            module.train(training)
    shapes = tuple(str(tuple(t.shape)) for t in pytree.tree_leaves(split_static(arguments)[0]))
    report = compare(outputs[0], outputs[1], arguments.get("attention_mask"))
    return EquivalenceReport(
        report.equal, report.exact, report.max_error, report.rms_error, shapes[:1]
    )


def compare(dense: list[Any], ours: list[Any], mask: Any = None) -> EquivalenceReport:
    """Compare flattened outputs; caches and other objects that are no tensors are passed over."""
    theirs = [t for t in dense if isinstance(t, torch.Tensor)]
    mine = [t for t in ours if isinstance(t, torch.Tensor)]
    equal, exact, worst, total, count = (
        len(theirs) == len(mine),
        len(theirs) == len(mine),
        0.0,
        0.0,
        0,
    )
    for a, b in zip(theirs, mine, strict=False):
        if a.shape != b.shape or a.dtype != b.dtype:
            return EquivalenceReport(False, False, float("inf"), float("inf"))
        a, b = _counted(a, mask), _counted(b, mask)
        exact = exact and torch.equal(a, b)
        if a.numel() == 0:
            continue
        tolerance = TOLERANCE.get(a.dtype, 0.0)
        x, y = a.double(), b.double()
        scale = x[x.isfinite()].abs().max().clamp_min(1.0) if x.isfinite().any() else 1.0
        error = ((x - y).abs() / scale).masked_fill(x == y, 0.0)
        error = error.masked_fill(x.isnan() & y.isnan(), 0.0).nan_to_num(nan=float("inf"))
        worst = max(worst, float(error.max()))
        total, count = total + float(error.square().sum()), count + error.numel()
        equal = equal and worst <= tolerance
    return EquivalenceReport(equal, exact, worst, (total / max(count, 1)) ** 0.5)


def _counted(output: torch.Tensor, mask: Any) -> torch.Tensor:
    """The positions of an output that the mask keeps."""
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and output.ndim >= 2:
        length = output.shape[1]
        if output.shape[0] == mask.shape[0] and length <= mask.shape[1] and output.ndim == 3:
            return output[mask[:, mask.shape[1] - length :] != 0]
    return output


def random_arguments(arguments: dict[str, Any], host: nn.Module, batch: int = 2) -> dict[str, Any]:
    """Arguments of the same form with random content: ids in the vocabulary, normal floats."""
    top = _vocabulary(host)
    generator = torch.Generator().manual_seed(0)

    def fill(name: str, t: torch.Tensor) -> torch.Tensor:
        shape = (batch, *t.shape[1:])
        if "mask" in name or "token_type" in name or t.dtype == torch.bool:
            return t.new_ones(shape) if "mask" in name else t.new_zeros(shape)
        if t.is_floating_point():
            return torch.randn(shape, generator=generator).to(t)
        return torch.randint(1, max(top, 2), shape, generator=generator).to(t)

    def fit(name: str, v: Any) -> Any:
        if isinstance(v, torch.Tensor) and v.ndim:
            return fill(name, v)
        return v

    return {n: fit(n, v) for n, v in arguments.items()}


def _vocabulary(host: nn.Module) -> int:
    """How many ids the model takes."""
    if is_hf(host):
        try:
            table = host.get_input_embeddings()
        except NotImplementedError:  # a model without a vocabulary
            return 2
        if isinstance(table, nn.Embedding):
            return table.num_embeddings
    return next((m.num_embeddings for m in host.modules() if isinstance(m, nn.Embedding)), 2)


def verify_conversion(moe: Any, arguments: dict[str, Any]) -> EquivalenceReport | None:
    """Hold a fresh conversion against its original at several batch sizes; raise on a difference.

    None for a model on the meta device, which computes nothing.
    """
    if moe.device.type == "meta":
        return None
    reports, shapes = [], []
    moe.eval()
    for batch in (2, 1):
        try:
            given = random_arguments(arguments, moe._compiler.host, batch)
            report = verify(moe._compiler.host, moe, given)
        except (IndexError, RuntimeError) as error:
            if isinstance(error, EquivalenceError):
                raise
            given = arguments  # content that the model does not take: compare on the user's own
            report = verify(moe._compiler.host, moe, given)
        if not report.equal:
            raise EquivalenceError(
                f"the converted model differs from the original by {report.max_error:.2e}: "
                "please report this model; nothing was changed"
            )
        reports.append(report)
        shapes.extend(report.shapes)
    return EquivalenceReport(
        True, all(r.exact for r in reports), max(r.max_error for r in reports),
        max(r.rms_error for r in reports), tuple(shapes),
    )  # fmt: skip


@torch.no_grad()
def is_causal(host: nn.Module, arguments: dict[str, Any]) -> bool:
    """Whether a position's output never depends on later ones: tried out, by changing the last."""
    tensors = [t for t in pytree.tree_leaves(arguments) if isinstance(t, torch.Tensor)]
    if any(t.is_meta for t in tensors) or any(p.is_meta for p in host.parameters()):
        if not is_hf(host):
            return True
        from .hf import is_causal_lm

        return is_causal_lm(host)
    training = host.training
    host.eval()
    try:
        given = random_arguments(arguments, host)
        before = _sequence_output(host(**given))
        main = next(n for n, v in given.items() if isinstance(v, torch.Tensor) and v.ndim >= 2)
        changed = given[main].clone()
        changed[:, -1] = changed[:, 0] + 1 if changed.is_floating_point() else 0
        after = _sequence_output(host(**(given | {main: changed})))
    except (IndexError, RuntimeError, ValueError):
        return True  # unknown: the gates that look back only are right for every model
    finally:
        host.train(training)
    if before is None or after is None or before.shape[1] < 2:
        return False
    return torch.allclose(before[:, :-1], after[:, :-1], rtol=1e-4, atol=1e-5)


def _sequence_output(outputs: Any) -> torch.Tensor | None:
    for t in pytree.tree_leaves(outputs):
        if isinstance(t, torch.Tensor) and t.ndim == 3:
            return t
    return None
