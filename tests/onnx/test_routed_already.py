"""Files of models that route already, with experts beside the weights of their own."""

import pytest
import torch
from onnx_files import saved_again
from own_experts import FORMS, Own, build, ids
from reference import randomize
from sweeps import some

import moe_rewrite
from moe_rewrite import LoRAExperts, TokenRouter

pytest.importorskip("onnx")


@pytest.mark.parametrize("form", FORMS)
def test_stacked_weights(form, tmp_path):
    example = {"x": torch.randn(2, 5, 6)}
    moe = moe_rewrite.convert(
        Own(form).eval(), split="layers.1", router=TokenRouter(), num_experts=2,
        experts=LoRAExperts(rank=2, sites=("up", "down")), example_inputs=example,
    )  # fmt: skip
    randomize(moe, size=0.3)
    saved_again(moe, example, tmp_path)


@pytest.mark.parametrize("form", some([None, "batched_mm"], [None]))
def test_models_of_transformers(form, tmp_path):
    """Rows that are sorted by expert and multiplied in groups, and a weight for each row."""
    pytest.importorskip("transformers")
    model = build("Qwen3Moe")
    if form is not None:
        model.set_experts_implementation(form)
    moe = moe_rewrite.convert(model, split=1, router=TokenRouter(), num_experts=2)
    assert any(name.endswith("experts.down_proj") for name, _, _ in moe.report.sites)
    randomize(moe, size=0.1)
    saved_again(moe, {"input_ids": ids(2, 6)}, tmp_path)
