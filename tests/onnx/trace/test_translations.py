"""Operators with a translation of our own, in ONNX Runtime against PyTorch on other sizes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

onnx = pytest.importorskip("onnx")
import onnxruntime

from moe_rewrite.onnx.trace.torch_export import onnx_program
from moe_rewrite.onnx.trace.translations import TRANSLATIONS

FREE = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}


class Attends(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, query, key, value, mask=None):
        return F.scaled_dot_product_attention(query, key, value, mask, **self.options)


def given(batch, length, keys, heads=4, shared=4, mask=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = [(heads, length, 6), (shared, keys, 6), (shared, keys, 5)]
    tensors = [torch.randn(batch, *shape, generator=generator) for shape in draw]
    if mask is None:
        return tensors
    seen = torch.rand(batch, 1, length, keys, generator=generator) > 0.4
    seen[0, 0, 0] = False  # a row that sees nothing
    if mask == "bool":
        return [*tensors, seen]
    return [*tensors, torch.randn(seen.shape, generator=generator).masked_fill(~seen, -torch.inf)]


def session(module, tensors, shapes):
    program = onnx_program(
        module, tuple(tensors), shapes, 20, custom_translation_table=TRANSLATIONS
    )
    operators = {n.op_type for n in program.model_proto.graph.node}
    return onnxruntime.InferenceSession(program.model_proto.SerializeToString()), operators


def assert_same(module, example, others, shapes):
    ort, operators = session(module, example, shapes)
    for tensors in others:
        feeds = {i.name: t.numpy() for i, t in zip(ort.get_inputs(), tensors, strict=True)}
        torch.testing.assert_close(torch.from_numpy(ort.run(None, feeds)[0]), module(*tensors))
    return operators


@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}])
def test_attention(mask, options):
    others = [given(2, 7, 7, mask=mask, seed=1), given(1, 3, 9, mask=mask, seed=2)]
    shapes = (FREE, FREE, FREE, *([FREE | {3: FREE[0]}] if mask else []))
    operators = assert_same(Attends(**options), given(3, 5, 8, mask=mask), others, shapes)
    assert not operators & {"Shape", "Reshape", "Slice"}


@pytest.mark.parametrize("keys", [(8, 7, 9), (5, 7, 3)])
def test_causal_attention(keys):
    others = [given(2, 7, keys[1], seed=1), given(1, 3, keys[2], seed=2)]
    assert_same(Attends(is_causal=True), given(3, 5, keys[0]), others, (FREE, FREE, FREE))


@pytest.mark.parametrize("shared", [1, 2])
def test_attention_of_heads_that_share_keys(shared):
    others = [given(2, 7, 7, shared=shared, seed=1), given(1, 3, 9, shared=shared, seed=2)]
    module = Attends(enable_gqa=True, is_causal=True)
    assert_same(module, given(3, 5, 8, shared=shared), others, (FREE, FREE, FREE))


def test_attention_without_heads():
    shapes = [torch.randn(3, 5, 6), torch.randn(3, 8, 6), torch.randn(3, 8, 5)]
    others = [torch.randn(2, 7, 6), torch.randn(2, 4, 6), torch.randn(2, 4, 5)]
    free = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    assert_same(Attends(), shapes, [others], (free, free, free))
