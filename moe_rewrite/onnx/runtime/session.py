"""ONNX Runtime sessions on tensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch

from ...utils.tensor_bytes import tensor_bytes

if TYPE_CHECKING:
    from ..file.protobuf import FileRange

FOLDER = "session.model_external_initializers_file_folder_path"


def open_session(
    path: Path, replaced: dict[str, torch.Tensor] | None = None,
    providers: list[Any] | None = None, options: Any = None,
    shared: dict[str, torch.Tensor] | None = None, **given: Any,
) -> Any:  # fmt: skip
    """An InferenceSession on a file.

    replaced: other values, perhaps of other sizes, for some initializers.
    shared: tensors in memory that are used for initializers instead of those in the file.
    given: further arguments of InferenceSession.
    """
    import onnxruntime as ort

    options = options or ort.SessionOptions()
    options.log_severity_level = 3
    if not options.intra_op_num_threads:
        options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # no busy waiting
    values = {name: _value(tensor) for name, tensor in (shared or {}).items()}
    for name, value in values.items():
        options.add_initializer(name, value)
    source: Any = str(path)
    if replaced:
        model = onnx.load(path, load_external_data=False)
        replace_initializers(model, replaced)
        options.add_session_config_entry(FOLDER, str(path.parent.resolve()))
        source = model.SerializeToString()
        del model
    session = ort.InferenceSession(source, options, providers or ["CPUExecutionProvider"], **given)
    session.shared_values = values  # must live as long as the session
    return session


def _value(tensor: torch.Tensor) -> Any:
    """An OrtValue on the memory of a tensor."""
    import onnxruntime as ort

    from ..file.dtypes import KINDS

    functional = tensor.detach().cpu().contiguous()
    if functional.dtype != torch.bfloat16:
        return ort.OrtValue.ortvalue_from_numpy(functional.numpy())
    kind = KINDS[functional.dtype]
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
        functional.view(torch.uint16).numpy(), kind
    )


FRUGAL = {"disabled_optimizers": ["ConstantFolding"]}  # it would copy weights to transpose them


def frugal_options(level: str = "ENABLE_ALL") -> Any:
    """Options, to be used with FRUGAL, of a session that takes little memory: there is one copy of
    each weight. level: of ONNX Runtime's optimizations."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_{level}")
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def replace_initializers(
    model: onnx.ModelProto,
    replaced: dict[str, torch.Tensor],
    ranges: dict[str, FileRange] | None = None,
) -> None:
    """Replace initializers of a model. ranges: of those whose bytes are in a file."""
    from ..file.dtypes import KINDS

    for tensor in model.graph.initializer:
        if tensor.name in replaced:
            new = replaced[tensor.name]
            fresh = onnx.TensorProto(name=tensor.name, dims=new.shape, data_type=KINDS[new.dtype])
            if ranges and tensor.name in ranges:
                ranges[tensor.name].mark(fresh)
            else:
                fresh.raw_data = bytes(tensor_bytes(new))
            tensor.CopyFrom(fresh)


def run(session: Any, feeds: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """All outputs; feeds that the graph does not take are ignored. Inputs and outputs of a bfloat16
    file are float32."""
    taken = {i.name for i in session.get_inputs()}
    tensors = {n: t.detach().cpu().contiguous() for n, t in feeds.items() if n in taken}
    given = {n: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for n, t in tensors.items()}
    return [torch.from_numpy(np.array(o)) for o in session.run(None, given)]
