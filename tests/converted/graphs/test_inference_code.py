"""Calls without gradients run LoRA experts as plain operators, with the same bits as other calls."""

import copy

import pytest
import torch
from torch import nn

import moe_rewrite
from moe_rewrite import LoRAExperts, TokenRouter
from moe_rewrite.converted.graphs.bound_graph import BoundGraph
from moe_rewrite.converted.graphs.flat_code import FlatCode
from moe_rewrite.converted.graphs.inference_code import InferenceCode
from moe_rewrite.kernels.lora.stacked import rows_and_scales
from tests.helpers import architectures, networks
from tests.helpers.reference import added, randomize
from tests.helpers.sweeps import some


@pytest.fixture
def used(monkeypatch):
    """Whether each call ran the code for inference."""
    seen, plain = [], BoundGraph._inference_code

    def spy(self):
        made = plain(self)
        seen.append(isinstance(made, InferenceCode))
        return made

    monkeypatch.setattr(BoundGraph, "_inference_code", spy)
    return seen


def require_same_bits(moe, used, monkeypatch, **call):
    """As the code that also serves training, called without gradients."""
    used.clear()
    made = moe(**call)
    assert used == [True]
    with monkeypatch.context() as patched:
        patched.setattr(BoundGraph, "_inference_code", BoundGraph._flat_code)
        wanted = moe(**call)
    for one, other in zip(*map(tensors, (made, wanted)), strict=True):
        assert torch.equal(one, other)
    return made


def tensors(made):
    return [t for t in torch.utils._pytree.tree_leaves(made) if isinstance(t, torch.Tensor)]


def ids(batch, length):
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, 97, (batch, length), generator=generator)


@torch.no_grad()
@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize(
    ("name", "granularity"),
    some(
        [("GPT2", "token"), ("GPT2", "prefix"), ("Llama", "token"), ("Bert", "sequence")],
        [("GPT2", "prefix"), ("Bert", "sequence")],
    ),
)
def test_the_same_bits(name, granularity, experts, used, monkeypatch):
    dense = architectures.build(name)
    router = TokenRouter(granularity=granularity)
    moe = moe_rewrite.convert(dense, split=1, router=router, num_experts=experts, verify=False)
    randomize(moe)
    for batch, length in [(2, 5), (3, 11)]:
        require_same_bits(moe, used, monkeypatch, input_ids=ids(batch, length))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype, used, monkeypatch):
    moe = moe_rewrite.convert(architectures.build("Llama").to(dtype), split=1, num_experts=2)
    randomize(moe)
    require_same_bits(moe, used, monkeypatch, input_ids=ids(2, 7))


@torch.no_grad()
def test_generating(used, monkeypatch):
    """One token at a time, with a batch that is padded."""
    moe = moe_rewrite.convert(architectures.build("Llama"), split=1, num_experts=2, verify=False)
    randomize(moe)
    given = {"input_ids": ids(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    given["attention_mask"][0, :3] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    made = moe.generate(**given, **options, output_logits=True, return_dict_in_generate=True)
    assert used and all(used)
    monkeypatch.setattr(BoundGraph, "_inference_code", BoundGraph._flat_code)
    wanted = moe.generate(**given, **options, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(made.sequences, wanted.sequences)
    for one, other in zip(made.logits, wanted.logits, strict=True):
        assert torch.equal(one, other)


def sequence(num_experts=2, **options):
    torch.manual_seed(0)
    dense = nn.Sequential(*(networks.Mlp() for _ in range(4))).eval()
    x = torch.randn(2, 5, networks.WIDTH)
    moe = moe_rewrite.convert(
        dense, split=2, example_inputs=x, num_experts=num_experts, verify=False, **options
    )
    randomize(moe)
    return moe, x


@torch.no_grad()
def test_changed_experts_are_seen(used):
    """However they change: in place, through `.data` while training, moved, added, off."""
    moe, x = sequence()

    def differs(change):
        before = moe(x)
        change()
        made = moe(x)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(FlatCode, "applies", lambda self: False)
            assert torch.equal(made, moe(x))  # block by block
        return not torch.equal(before, made)

    up = next(p for name, p in added(moe).items() if ".b." in name)
    assert differs(lambda: up.add_(0.5))

    def train():
        moe.train()
        moe(x)
        up.data.mul_(2)
        moe.eval()

    assert differs(train)
    assert differs(lambda: setattr(up, "data", up.data * 3))
    assert differs(lambda: moe.deactivate(0))
    assert differs(lambda: moe.activate(0))
    assert differs(lambda: (moe.expand(), moe.activate(2), randomize(moe, 5)))
    assert used and all(used)
    other = copy.deepcopy(moe)
    before = moe(x)
    for p in other.parameters():
        p.zero_()
    assert torch.equal(moe(x), before) and not torch.equal(other(x), before)


@torch.no_grad()
def test_what_else_runs(used, monkeypatch):
    """Without experts, with autocast, with gradients and with experts of other kinds."""
    moe, x = sequence()
    want = moe(x)
    used.clear()
    with moe.disable_experts():
        assert not torch.equal(moe(x), want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moe(x)
    with torch.enable_grad():
        torch.testing.assert_close(moe(x), want)
    assert not used
    with torch.inference_mode():
        assert torch.equal(moe(x), want)
    few, x = sequence(3, router=TokenRouter(top_k=2), experts=LoRAExperts(rank=4))
    few(x)
    assert used == [True, False]  # those of rows that are sorted are another operation


@pytest.mark.parametrize("lead", [(4, 5), (4, 1), (1, 5), (1, 1), (5,), (1,), ()])
def test_scales_are_laid_out_as_rows(lead):
    x, scales = (
        torch.randn(4, 5, 3).transpose(0, 1).contiguous().transpose(0, 1),
        torch.rand(*lead, 2),
    )
    rows, flat = rows_and_scales(x, scales)
    assert torch.equal(rows, x.reshape(20, 3))
    assert torch.equal(flat, scales.expand(4, 5, 2).reshape(20, 2))
