"""Documents that are packed into one sample get what they get alone, from gates that average too."""

import pytest
import torch
from reference import randomize
from torch import nn

import moe_rewrite
from moe_rewrite import TokenRouter
from moe_rewrite.errors import ConfigError, InputError

LENGTHS = ((10, 7), (1, 1, 15), (17,), (4, 5, 1, 7))
GATES = [
    TokenRouter(granularity="prefix"),
    TokenRouter(granularity="token"),
    TokenRouter(granularity="prefix", fit="analytic"),
]


def documents(lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 90, (1, n), generator=generator) for n in lengths]


def positions(lengths):
    return torch.cat([torch.arange(n) for n in lengths])[None]


def block_mask(lengths):
    of = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    return ((of[:, None] == of[None]) & torch.ones(len(of), len(of)).tril().bool())[None, None]


def llama(attention="sdpa"):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=100, attn_implementation=attention,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module", params=GATES, ids=lambda g: f"{g.granularity}-{g.fit}")
def moe(request):
    moe = moe_rewrite.convert(llama(), split=1, router=request.param, num_experts=2)
    randomize(moe)
    if request.param.fit == "analytic":
        moe.fit_router(None, [{"input_ids": torch.cat(documents((9, 9, 9)))}])
        moe.fit_router(0, [{"input_ids": torch.cat(documents((9, 9), seed=5))}])
        moe.fit_router(1, [{"input_ids": torch.cat(documents((9, 9), seed=6))}])
    return moe


@torch.no_grad()
def logits(moe, ids, **given):
    return moe(ids, use_cache=False, **given).logits


def alone(moe, parts):
    return torch.cat([logits(moe, part) for part in parts], 1)


def forms(lengths):
    """The ways in which transformers takes packed documents."""
    pairs = block_mask(lengths)
    bias = torch.zeros(pairs.shape).masked_fill(~pairs, torch.finfo(torch.float32).min)
    return {
        "position_ids": {"position_ids": positions(lengths)},
        "bool mask": {"attention_mask": pairs, "position_ids": positions(lengths)},
        "bias": {"attention_mask": bias, "position_ids": positions(lengths)},
    }


@pytest.mark.parametrize("form", ["position_ids", "bool mask", "bias"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_a_document_gets_what_it_gets_alone(moe, lengths, form):
    parts = documents(lengths)
    packed = logits(moe, torch.cat(parts, 1), **forms(lengths)[form])
    assert torch.allclose(packed, alone(moe, parts), rtol=1e-4, atol=2e-6)


def test_samples_of_a_batch_are_packed_otherwise_each(moe):
    parts = [documents((10, 7), seed=2), documents((3, 14), seed=3)]
    ids = torch.cat([torch.cat(p, 1) for p in parts])
    packed = logits(moe, ids, position_ids=torch.cat([positions((10, 7)), positions((3, 14))]))
    assert torch.allclose(packed, torch.cat([alone(moe, p) for p in parts]), rtol=1e-4, atol=2e-6)
    one_row = logits(moe, ids, position_ids=positions((10, 7)))  # for all samples
    assert torch.allclose(one_row[:1], packed[:1], rtol=1e-4, atol=2e-6)


def test_nothing_of_one_document_reaches_another_in_training(moe):
    first, second = documents((10, 7))
    changed = (first + 1) % 90
    moe.train()
    outputs = [
        moe(torch.cat([part, second], 1), position_ids=positions((10, 7))).logits[:, 10:]
        for part in (first, changed)
    ]
    grads = [torch.autograd.grad(o.square().sum(), moe.trainable_parameters()) for o in outputs]
    moe.eval()
    assert torch.equal(*outputs)
    assert all(map(torch.equal, *grads))


def test_many_documents_lose_no_digits():
    """Sums of earlier documents are taken off: in float32 that would cost digits."""
    moe = moe_rewrite.convert(llama("eager"), split=1, num_experts=1)
    randomize(moe)
    lengths = (2,) * 600
    parts = documents(lengths)
    packed = logits(moe, torch.cat(parts, 1), position_ids=positions(lengths))
    # a product of 1,200 rows rounds otherwise than one of 2 (9e-6 seen); float32 sums: 1e-4
    torch.testing.assert_close(packed, alone(moe, parts), rtol=1e-4, atol=3e-5)


# -- encoders of one's own ---------------------------------------------------------------------------


class Encoder(nn.Module):
    """Attends to positions of the same segment, or to tokens that are not padding (0)."""

    def __init__(self, by, causal=True):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.by, self.causal = nn.Embedding(100, 16), by, causal
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.head = nn.Linear(16, 5)

    def forward(self, ids, segments=None):
        x = self.embed(ids)
        if self.by == "segments":
            allowed = segments[:, :, None] == segments[:, None, :]
        else:
            allowed = (ids != 0)[:, None, :] & torch.ones_like(ids, dtype=torch.bool)[:, :, None]
        if self.causal:
            allowed = allowed & torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
        for layer in self.layers:
            scores = (x @ x.transpose(1, 2)).masked_fill(~allowed, -1e9)
            x = x + torch.tanh(layer(scores.softmax(-1) @ x))
        return self.head(x if self.causal else x.mean(1))


BUILT = {  # ways to make a bias of pairs, and to use it
    "product": lambda allowed: (1.0 - allowed.float()) * -1e9,
    "logarithm": lambda allowed: allowed.float().log(),
    "filled": lambda allowed: torch.zeros(allowed.shape).masked_fill_(~allowed, -1e9),
    "assigned": lambda allowed: assigned(torch.zeros(allowed.shape), ~allowed),
    "scalar": lambda allowed: torch.where(allowed, torch.tensor(0.0), torch.tensor(-1e9)),
    "multiplied": lambda allowed: (1.0 - allowed.float()).mul_(-1e9),
}
USED = {
    "add": lambda scores, bias: scores + bias,
    "add_": lambda scores, bias: scores.add_(bias),
    "sub": lambda scores, bias: scores - (-bias),
    "baddbmm": lambda scores, bias: torch.baddbmm(
        bias, torch.eye(scores.shape[1]).expand(scores.shape), scores
    ),
    "masked_fill_": lambda scores, bias: scores.masked_fill_(bias < 0, float("-inf")),
}


def assigned(bias, where):
    bias[where] = -1e9
    return bias


class Biased(Encoder):
    """An encoder that makes its bias once, or in each of its layers."""

    def __init__(self, built, used, once):
        super().__init__("segments")
        self.built, self.used, self.once = BUILT[built], USED[used], once

    def bias(self, segments):
        length = segments.shape[1]
        allowed = segments[:, :, None] == segments[:, None, :]
        allowed &= torch.ones(length, length).tril().bool()
        return self.built(allowed)

    def forward(self, ids, segments):
        x, bias = self.embed(ids), self.bias(segments)
        for layer in self.layers:
            bias = bias if self.once else self.bias(segments)
            scores = self.used(x @ x.transpose(1, 2), bias)
            x = x + torch.tanh(layer(scores.softmax(-1) @ x))
        return self.head(x)


@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize(
    ("built", "used"), [*((b, "add") for b in BUILT), *(("filled", u) for u in USED)]
)
def test_biases_that_are_written_in_place_or_used_in_other_ways(built, used, once, split):
    dense, parts = Biased(built, used, once).eval(), documents((4, 5, 1, 7))
    given = {name: torch.zeros(2, 9, dtype=torch.long) for name in ("ids", "segments")}
    moe = moe_rewrite.convert(
        dense, split=split, router=GATES[0], num_experts=2, example_inputs=given
    )
    randomize(moe)
    segments = torch.tensor([[3] * 4 + [7] * 5 + [1] + [2] * 7])
    with torch.no_grad():
        packed = moe(torch.cat(parts, 1), segments)
        each = [moe(p, torch.zeros_like(p)) for p in parts]
    assert torch.allclose(packed, torch.cat(each, 1), rtol=1e-4, atol=2e-6)


def encoder(by, split=1, router=GATES[0], causal=True):
    given = {"ids": torch.ones(2, 9, dtype=torch.long)}
    if by == "segments":
        given["segments"] = torch.zeros(2, 9, dtype=torch.long)
    moe = moe_rewrite.convert(
        Encoder(by, causal).eval(), split=split, router=router, num_experts=2, example_inputs=given
    )
    randomize(moe)
    return moe


@pytest.mark.parametrize("split", [0, 1])
def test_segments_of_a_model_of_ones_own(split):
    """Also where the model makes its table after the cut."""
    moe, parts = encoder("segments", split), documents((6, 8))
    segments = torch.tensor([[3] * 6 + [7] * 8])
    packed = moe(torch.cat(parts, 1), segments)
    each = [moe(p, torch.zeros_like(p)) for p in parts]
    assert torch.allclose(packed, torch.cat(each, 1), rtol=1e-4, atol=2e-6)


def test_padding_that_the_model_finds_itself_does_not_count():
    moe = encoder("padding")
    (ids,) = documents((8,))
    ids = ids + 1
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], 1)
    assert torch.allclose(moe(padded)[:, 5:], moe(ids), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(("router", "what"), [
    (TokenRouter(granularity="token", policy="expert", base=False), "expert choice"),
    (TokenRouter(granularity="sequence"), "a sequence gate"),
])  # fmt: skip
def test_gates_that_take_a_sample_as_a_whole_refuse_packed_documents(router, what):
    moe = encoder("segments", router=router, causal=False)
    ids = torch.cat(documents((6, 8)), 1)
    whole = torch.zeros_like(ids)
    assert moe(ids, whole).shape == (1, 5)
    with pytest.raises(InputError, match=f"{what} takes each sample as one document"):
        moe(ids, torch.tensor([[3] * 6 + [7] * 8]))


def test_a_file_that_could_not_follow_documents_is_refused(tmp_path):
    pytest.importorskip("onnx")
    with pytest.raises(ConfigError, match="attention stops within samples"):
        moe_rewrite.export_onnx(encoder("segments"), tmp_path / "m.onnx", example_inputs={
            "ids": torch.ones(2, 9, dtype=torch.long),
            "segments": torch.zeros(2, 9, dtype=torch.long),
        })  # fmt: skip
    assert not list(tmp_path.iterdir())
