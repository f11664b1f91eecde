"""Files in bfloat16, which ONNX Runtime's CPU provider has no kernels for: in ONNX's own evaluator."""

import numpy as np
import onnx
import pytest
import torch
from architectures import build
from onnx.reference import ReferenceEvaluator
from reference import randomize

import moe_rewrite
from moe_rewrite import FFNExperts, LoRAExperts

KINDS = {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}


@pytest.mark.parametrize(("kind", "options"), [
    ("pmoe", {"cache": True, "open_inputs": True}), ("upcycle", {}),
])  # fmt: skip
def test_a_call_gives_and_gets_float32(kind, options, tmp_path):
    experts = FFNExperts() if kind == "upcycle" else LoRAExperts(rank=4)
    dense, path = build("Llama", layers=2), tmp_path / "model.onnx"
    moe = moe_rewrite.convert(dense, mode=kind, split=1, num_experts=2, experts=experts)
    randomize(moe.eval(), size=0.05)
    moe_rewrite.export_onnx(moe, path, dtype="bfloat16", verify=False, **options)
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
    got = torch.from_numpy(ReferenceEvaluator(model).run(["logits"], feeds)[0])
    assert got.dtype == torch.float32
    assert (got - want).abs().max() <= 3e-2 * want.abs().max()
