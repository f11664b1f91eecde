"""A module of row-wise inputs in ONNX Runtime, for the tests and timings of lowerings."""

from __future__ import annotations

from typing import Any

import torch


def session_of(
    module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], options: Any = None, opset: int = 20
) -> Any:
    """inputs: tensors (T, ...) of any T > 1, which stays open. Inputs keep forward's names."""
    import onnxruntime as ort

    from ..translate import quiet

    rows = torch.export.Dim("rows")
    with torch.no_grad(), quiet():
        exported = torch.export.export(
            module, inputs, dynamic_shapes=tuple({0: rows} for _ in inputs), strict=False
        )
        program = torch.onnx.export(exported, dynamo=True, opset_version=opset, verbose=False)
    assert program is not None
    options = options or ort.SessionOptions()
    options.log_severity_level = 3
    if not options.intra_op_num_threads:
        options.intra_op_num_threads = torch.get_num_threads()
    model = program.model_proto.SerializeToString()
    return ort.InferenceSession(model, options, ["CPUExecutionProvider"])
