"""bfloat16 files, run in ONNX's own evaluator since ONNX Runtime's CPU provider has no kernels."""

import cnns
import numpy as np
import onnx
import pytest
import torch
from architectures import build
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from reference import randomize
from sweeps import some

import moe_rewrite
from moe_rewrite import FFNExperts, LoRAExperts, PatchRouter


class GatherElements(OpRun):
    """The evaluator's own refuses indices that leave out rows of other dimensions."""

    op_domain = ""

    def _run(self, data, indices, axis=0):
        wide = torch.from_numpy(data.astype(np.float32))
        return (wide.gather(axis, torch.from_numpy(indices)).numpy().astype(data.dtype),)


KINDS = {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}


@pytest.mark.parametrize(("kind", "options"), [
    ("pmoe", {"cache": True, "open_inputs": True}),
    pytest.param("upcycle", {"lowering": "sparse"}, marks=pytest.mark.sweep),
    pytest.param("upcycle", {"lowering": "dense"}, marks=pytest.mark.sweep),
    pytest.param("upcycle", {"open_experts": True}, marks=pytest.mark.sweep),
])  # fmt: skip
def test_a_call_gives_and_gets_float32(kind, options, tmp_path):
    experts = FFNExperts() if kind == "upcycle" else LoRAExperts(rank=4)
    dense, path = build("Llama", layers=2), tmp_path / "model.onnx"
    moe = moe_rewrite.convert(dense, mode=kind, split=1, num_experts=4, experts=experts)
    randomize(moe.eval(), size=0.05)
    report = moe_rewrite.export_onnx(moe, path, dtype="bfloat16", verify=False, **options)
    assert not report.cpu_only
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    stored = {t.name: t.data_type for t in model.graph.initializer}
    assert onnx.TensorProto.BFLOAT16 in stored.values()
    of = {v.name: v.type.tensor_type for v in [*model.graph.input, *model.graph.output]}
    assert {t.elem_type for n, t in of.items() if n not in stored} == KINDS
    weights = {n for n in of if n in stored}  # experts that a call may replace
    assert bool(weights) == ("open_inputs" in options)
    assert all(of[n].elem_type == stored[n] for n in weights)
    ids = torch.randint(3, 97, (2, 5), generator=torch.Generator().manual_seed(0))
    feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones((2, 5), np.int64)}
    for name in (i.name for i in model.graph.input if i.name.startswith("past")):
        sizes = [d.dim_value for d in of[name].shape.dim]  # zero where open: there is no past
        feeds[name] = np.zeros([2, *sizes[1:]], np.float32)
    with torch.no_grad():
        want = moe(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert_near(ReferenceEvaluator(model).run(["logits"], feeds)[0], want)


@pytest.mark.parametrize("opset", some([20, 22], [20]))
def test_what_has_no_bfloat16_runs_in_float32(opset, tmp_path):
    """Convolutions, in this operator set or on CUDA, and the choice of a router."""
    dense, path = cnns.build("ResNet"), tmp_path / "model.onnx"
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    moe = moe_rewrite.convert(
        dense, split="layer3", router=PatchRouter(grid=4, per_expert=5), num_experts=2,
        example_inputs=x, verify=False,
    )  # fmt: skip
    randomize(moe, size=0.05)
    report = moe_rewrite.export_onnx(
        moe.eval(), path, dtype="bfloat16", opset=opset, verify=False, example_inputs=x
    )
    assert {"Conv", "TopK"} <= report.operators.keys() and not report.cpu_only
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    stored = {t.name: t.data_type for t in model.graph.initializer}
    kinds = {
        stored[n.input[1]] for n in model.graph.node if n.op_type == "Conv" and n.input[1] in stored
    }
    assert not kinds  # what is stored in bfloat16 reaches a convolution through a cast
    with torch.no_grad():
        want = moe(x)
    evaluator = ReferenceEvaluator(model, new_ops=[GatherElements])
    assert_near(evaluator.run(None, {"x": x.numpy()})[0], want)


def assert_near(got, want):
    assert got.dtype == np.float32
    assert (torch.from_numpy(got) - want).abs().max() <= 3e-2 * want.abs().max()
