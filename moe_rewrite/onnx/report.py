"""The report of an export: what was written, and how it was verified."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ..utils.text_tables import count, table


@dataclass(frozen=True)
class Check:
    """One comparison of ONNX Runtime with PyTorch.

    case: the inputs and experts, as text.
    max_error, rms_error: relative to max(1, PyTorch's largest value).
    """

    case: str
    max_error: float
    rms_error: float


@dataclass
class OnnxReport:
    """The report of one export. ``print(report)`` shows it as tables.

    path: name of the .onnx file.
    files: name -> size in bytes.
    opset: ONNX operator set.
    dtype: of the model, and the bits of quantized experts.
    lowering: which lowerings were chosen, and why.
    inputs, outputs: name -> dimensions, dynamic ones as names.
    experts: names of the experts in the file.
    left_out: names of the inactive experts, which are not in it.
    open_experts: whether the file can run with another number of experts.
    operators: operator -> number of nodes.
    cpu_only: operator and type -> number of nodes without a kernel in ONNX Runtime's CUDA provider.
    checks: comparisons of ONNX Runtime with PyTorch.
    notes: what the user should know.
    seconds: time spent, by step.
    """

    path: str
    files: dict[str, int]
    opset: int
    dtype: str
    lowering: str
    inputs: dict[str, list[Any]]
    outputs: dict[str, list[Any]]
    experts: list[str]
    left_out: list[str]
    open_experts: bool
    operators: dict[str, int]
    cpu_only: dict[str, int] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def max_error(self) -> float:
        return max((c.max_error for c in self.checks), default=0.0)

    @property
    def rms_error(self) -> float:
        return max((c.rms_error for c in self.checks), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"max_error": self.max_error, "rms_error": self.rms_error}

    def __str__(self) -> str:
        def shape(of: dict[str, list[Any]]) -> str:
            return ", ".join(f"{n} ({', '.join(map(str, d))})" for n, d in of.items())

        number = "open" if self.open_experts else "fixed"
        facts = [
            ("files", ", ".join(f"{n} {count(s)}B" for n, s in self.files.items())),
            ("opset, dtype", f"{self.opset}, {self.dtype}"),
            ("lowering", self.lowering),
            ("experts", f"{', '.join(self.experts) or 'none'} (number {number})"),
            ("left out", ", ".join(self.left_out) or "none"),
            ("on CUDA", _cuda(self.cpu_only)),
            ("inputs", shape(self.inputs)), ("outputs", shape(self.outputs)),
            ("seconds", ", ".join(f"{k} {v:.2f}" for k, v in self.seconds.items())),
            *(("note", n) for n in self.notes),
        ]  # fmt: skip
        rows = [(c.case, f"{c.max_error:.2e}", f"{c.rms_error:.2e}") for c in self.checks]
        columns = ["ONNX Runtime against PyTorch", "max error", "rms error"]
        return "\n".join([table(["export", self.path], facts), table(columns, rows)])


def _cuda(cpu_only: dict[str, int]) -> str:
    names = ", ".join(f"{n} ({c})" for n, c in cpu_only.items())
    return f"left to the CPU: {names}" if names else "a kernel for every operator"
