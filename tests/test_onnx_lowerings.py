"""Feed-forward experts in ONNX, each lowering against plain PyTorch, an idle expert among them."""

import itertools

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("onnx")

from moe_rewrite.errors import ConfigError  # noqa: E402
from moe_rewrite.onnx.lowerings.contrib import (  # noqa: E402
    dequantized,
    ffn_contrib,
    ffn_quantized,
    fits,
    interleaved,
    quantized,
)
from moe_rewrite.onnx.lowerings.dense import ffn_dense  # noqa: E402
from moe_rewrite.onnx.lowerings.session import session_of  # noqa: E402
from moe_rewrite.onnx.lowerings.sparse import ffn_sparse  # noqa: E402

E, D, H, K = 4, 32, 64, 2
ACTS = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "identity": lambda x: x,
}


def reference(x, logits, w, activation):
    """Row by row, expert by expert."""
    out = torch.zeros_like(x)
    for t in range(len(x)):
        chosen = logits[t].softmax(-1).topk(K)
        for gate, e in zip(chosen.values / chosen.values.sum(), chosen.indices, strict=True):
            up = w["up"][e] @ x[t] + (w["up_bias"][e] if "up_bias" in w else 0)
            h = ACTS[activation](up)
            if "gate" in w:
                h = ACTS[activation](w["gate"][e] @ x[t]) * up
            out[t] += gate * (w["down"][e] @ h + (w["down_bias"][e] if "down_bias" in w else 0))
    return out


def weights(gated, biased, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = {"up": (E, H, D), "down": (E, D, H)}
    shapes |= {"gate": (E, H, D)} if gated else {}
    shapes |= {"up_bias": (E, H), "down_bias": (E, D)} if biased else {}
    return {k: torch.randn(s, generator=draw) * s[-1] ** -0.5 for k, s in shapes.items()}


def rows(T, seed):
    """Rows whose router never chooses expert 1."""
    draw = torch.Generator().manual_seed(seed)
    x, logits = torch.randn(T, D, generator=draw), torch.randn(T, E, generator=draw)
    logits[:, 1] = -20.0
    return x, logits


class Routed(torch.nn.Module):
    def __init__(self, w, lowering, activation):
        super().__init__()
        self.w, self.lowering, self.activation = w, lowering, activation
        for name, tensor in w.items():
            self.register_buffer(name, tensor)

    def forward(self, x, logits):
        biases = {}
        if "up_bias" in self.w:
            biases = {"up_bias_EH": self.up_bias, "down_bias_ED": self.down_bias}
        gate = self.gate if "gate" in self.w else None
        if self.lowering is ffn_contrib:
            return ffn_contrib(
                x, logits, K, self.up, self.down, gate, **biases, activation=self.activation
            )
        top = logits.softmax(-1).topk(K)
        gates = top.values / top.values.sum(-1, keepdim=True)
        return self.lowering(
            x, gates, top.indices, self.up, self.down, gate, **biases, activation=self.activation
        )


@pytest.mark.parametrize("lowering", [ffn_dense, ffn_sparse, ffn_contrib])
@pytest.mark.parametrize(
    "gated,biased,activation",
    [
        (True, False, "silu"),
        (False, True, "gelu_tanh"),
        (False, False, "relu"),
        (False, True, "silu"),
    ],
)
def test_lowering_equals_a_loop_over_rows(lowering, gated, biased, activation):
    w = weights(gated, biased)
    module = Routed(w, lowering, activation)
    session = session_of(module, rows(5, 0))
    for T in (1, 7, 64):
        x, logits = rows(T, T)
        want = reference(x, logits, w, activation)
        got = torch.from_numpy(session.run(None, {"x": x.numpy(), "logits": logits.numpy()})[0])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        if lowering is not ffn_contrib:
            torch.testing.assert_close(module(x, logits), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits,swiglu", list(itertools.product((4, 8), (False, True))))
def test_quantized_operator_computes_its_dequantized_weights(bits, swiglu):
    w = weights(swiglu, False)
    first = interleaved(w["gate"], w["up"]) if swiglu else w["up"]
    (up, up_scales), (down, down_scales) = quantized(first, bits), quantized(w["down"], bits)
    full = dequantized(up, up_scales, bits)
    stored = {"down": dequantized(down, down_scales, bits)}
    stored |= {"gate": full[:, 0::2], "up": full[:, 1::2]} if swiglu else {"up": full}

    class Quantized(torch.nn.Module):
        def forward(self, x, logits):
            return ffn_quantized(x, logits, K, bits, up, up_scales, down, down_scales, swiglu)

    session = session_of(Quantized(), rows(5, 0))
    for T in (1, 7, 64):
        x, logits = rows(T, T)
        want = reference(x, logits, stored, "silu")
        got = torch.from_numpy(session.run(None, {"x": x.numpy(), "logits": logits.numpy()})[0])
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    error = (full - first).abs().amax() / first.abs().amax()
    assert error < 0.6 / (2 ** (bits - 1) - 1)  # half a step


def test_what_does_not_fit_the_operator_is_refused():
    assert "no top-k" in fits("silu", False, None)
    assert "'gelu' is none" in fits("gelu", False, 2)  # its gelu is the tanh approximation
    assert "SwiGLU" in fits("gelu", True, 2) and fits("silu", True, 2) == ""
    x, logits = rows(3, 0)
    w = weights(True, False)
    with pytest.raises(ConfigError, match="SwiGLU"):
        ffn_contrib(x, logits, K, w["up"], w["down"], w["gate"], activation="relu")
    with pytest.raises(ConfigError, match="bits=3"):
        quantized(w["up"], 3)
