"""What an export wrote and how it was proven."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ..utils.text_tables import count, table


@dataclass(frozen=True)
class Check:
    """One comparison of ONNX Runtime with PyTorch; errors relative to the largest value."""

    case: str
    max_error: float
    rms_error: float


@dataclass
class OnnxReport:
    """One export. Prints as tables; the fields are the same facts for programs.

    files: sizes in bytes by name. inputs, outputs: dimensions by name, open ones as words.
    experts: names of those in the file; left_out: those that were off. lowering: what was chosen,
    and why. open_experts: whether the file runs with another number of experts. operators: how
    often each is used; cpu_only: those that ONNX Runtime's CUDA provider has no kernel for, with the
    type. checks: ONNX Runtime against PyTorch, case by case.
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
