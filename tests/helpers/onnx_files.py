"""Exported files, written again and run by both runtimes."""

import torch

import moe_rewrite
from moe_rewrite.frontend.example_inputs import random_arguments


def saved_again(moe, example, folder):
    """Export, one round through onnx.load and onnx.save, and what both runtimes give of fresh
    inputs of another size."""
    import onnx

    report = moe_rewrite.export_onnx(moe, folder / "first.onnx", example_inputs=example)
    assert report.max_error < 1e-4 and len(report.checks) >= 3
    onnx.save(onnx.load(folder / "first.onnx"), folder / "again.onnx")
    loaded = moe_rewrite.onnx.load(folder / "again.onnx")
    given = random_arguments(example, moe.host.vocabulary(), 4)
    got = loaded(**{n: given[n] for n in loaded.inputs})
    with torch.no_grad():
        want = moe(**given, **({"use_cache": False} if "input_ids" in given else {}))
    want = {"output": want} if isinstance(want, torch.Tensor) else dict(want)
    for name, tensor in got.items():
        name = name.removesuffix(".out")  # if a weight has the output's name
        if name in want:
            torch.testing.assert_close(tensor, want[name], rtol=1e-3, atol=1e-4)
    assert {name.removesuffix(".out") for name in got} & set(want)
