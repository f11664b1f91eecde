"""Translations for operators that torch.onnx lacks or writes as many nodes."""

from __future__ import annotations

import math
from typing import Any

import onnx
import torch


def _op() -> Any:
    from onnxscript import opset20

    return opset20


def _round(number: Any, digits: None = None) -> Any:
    """Python's round() of a size: halves go to the even number, as in ONNX."""
    op = _op()
    return op.Cast(op.Round(number), to=onnx.TensorProto.INT64)


def _sort(x: Any, stable: bool = False, dim: int = -1, descending: bool = False) -> Any:
    """A stable sort as a TopK, which orders equal values by index."""
    op = _op()
    size = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]))
    return op.TopK(x, size, axis=dim, largest=int(descending))


def _attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """softmax(query key^T scale + mask) value, for query (..., H, L, D), key (..., Hk, S, D) and
    value (..., Hk, S, V). A fully masked row gives zero. torch.onnx's own translation transposes
    the key by its shape, in nine nodes."""
    op = _op()
    *rows, last, second = range(len(key.shape))
    if enable_gqa and query.shape[-3] != key.shape[-3]:
        key, value = (_for_each_head(t, int(query.shape[-3])) for t in (key, value))
    width = query.shape[-1]
    if scale is None and not isinstance(width, int):
        raise TypeError(f"attention over heads of {width} features: expected a fixed size")
    factor = op.Constant(value_float=width**-0.5 if scale is None else scale)
    turned = op.Transpose(key, perm=[*rows, second, last])
    scores = op.MatMul(op.Mul(query, op.CastLike(factor, query)), turned)
    bias = _causal(query, key) if is_causal else attn_mask
    if bias is None:
        weights = op.Softmax(scores, axis=-1)
    else:
        if attn_mask is not None and attn_mask.dtype == onnx.TensorProto.BOOL:
            bias = op.Where(attn_mask, _like(0.0, query), _like(-math.inf, query))
        weights = op.Softmax(op.Add(scores, bias), axis=-1)
    if attn_mask is not None:
        weights = op.Where(op.IsNaN(weights), _like(0.0, query), weights)
    if dropout_p:
        weights, _ = op.Dropout(weights, op.Constant(value_float=dropout_p))
    return op.MatMul(weights, value)


def _like(number: float, tensor: Any) -> Any:
    op = _op()
    return op.CastLike(op.Constant(value_float=number), tensor)


def _causal(query: Any, key: Any) -> Any:
    """An (L, S) bias: zero up to the diagonal and minus infinity above it."""
    op = _op()
    sizes = [op.Shape(t, start=-2, end=None) for t in (query, key)]
    first = [op.Slice(s, op.Constant(value_ints=[0]), op.Constant(value_ints=[1])) for s in sizes]
    full = op.Expand(_like(-math.inf, query), op.Concat(*first, axis=0))
    return op.Trilu(full, op.Constant(value_int=1), upper=1)


def _for_each_head(x: Any, heads: int) -> Any:
    """(..., Hk, S, D) -> (..., H, S, D): each head repeated for the query heads that share it."""
    op = _op()
    *lead, kept, _, width = x.shape
    times = [1] * len(lead) + [1, heads // int(kept), 1, 1]
    repeated = op.Expand(
        op.Unsqueeze(x, op.Constant(value_ints=[len(lead) + 1])), op.Constant(value_ints=times)
    )
    shape = [0] * len(lead) + [heads, -1, int(width)]
    return op.Reshape(repeated, op.Constant(value_ints=shape))


def _conv3d(
    x: Any, weight: Any, bias: Any = None, stride: Any = (1, 1, 1), padding: Any = (0, 0, 0),
    dilation: Any = (1, 1, 1), groups: int = 1,
) -> Any:  # fmt: skip
    """torch.onnx's own translation makes a bias of two dimensions where there is none."""
    options: dict[str, Any] = {
        "strides": [*stride], "pads": [*padding, *padding], "dilations": [*dilation], "group": groups,
    }  # fmt: skip
    return _op().Conv(x, weight, bias, **options)


def _grouped_product(rows: Any, weights: Any, ends: Any) -> Any:
    """Rows (S, I) sorted into G groups that end at `ends`, each times its group's weight (G, I, O).
    The file gathers a weight for each row."""
    op = _op()
    zero, one = (op.Constant(value_int=n) for n in (0, 1))
    axis = op.Constant(value_ints=[1])
    count = op.Squeeze(op.Shape(rows, start=0, end=1))
    places = op.Unsqueeze(op.Range(zero, count, one), axis)
    passed = op.LessOrEqual(op.Cast(ends, to=onnx.TensorProto.INT64), places)
    group = op.ReduceSum(op.Cast(passed, to=onnx.TensorProto.INT64), axis, keepdims=0)
    last = op.Sub(op.Squeeze(op.Shape(weights, start=0, end=1)), one)
    own = op.Gather(weights, op.Min(group, last), axis=0)
    return op.Squeeze(op.MatMul(op.Unsqueeze(rows, axis), own), axis)


TRANSLATIONS: Any = {
    torch.ops.aten.conv3d.default: _conv3d,
    round: _round,
    torch.ops.aten.sort.stable: _sort,
    torch.ops.aten.scaled_dot_product_attention.default: _attention,
}


def translations() -> dict[Any, Any]:
    """For PyTorch's operators, and those that transformers has added, if it is imported."""
    added = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    return TRANSLATIONS if added is None else {**TRANSLATIONS, added.default: _grouped_product}
