"""Experts whose weights lie off the device until a call uses them. The device is the CPU here, so that
what lies on it is counted as the copies that are kept."""

import copy
from concurrent.futures import ThreadPoolExecutor

import architectures
import pytest
import torch
from networks import Residual
from torch import nn

import moe_rewrite
from moe_rewrite import (
    CarvedExperts,
    FFNExperts,
    LoRAExperts,
    MoeRewriteError,
    PatchRouter,
    RegionExperts,
    TokenRouter,
)
from tests.helpers.sweeps import some

EXPERTS = 12
ONE = TokenRouter(top_k=1, granularity="prefix", gate="all", init=1.0, base=False)
TWO = TokenRouter(top_k=2, granularity="token")
SUMS = TokenRouter(fit="analytic", granularity="prefix", top_k=1, projection=32)
PATCHES = PatchRouter(grid=2, per_expert=2)


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(
        *[nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(3)]
    )


KINDS = {  # model, router, experts
    "LoRA": (Residual, ONE, LoRAExperts(2)),
    "copies": (Residual, ONE, FFNExperts()),
    "LoRA, sums": (Residual, SUMS, LoRAExperts(2)),
    "LoRA, two of each row": (Residual, TWO, LoRAExperts(2)),
    "LoRA of convolutions": (convolutions, PATCHES, LoRAExperts(2)),
    "Llama, LoRA": (lambda: architectures.build("Llama"), ONE, LoRAExperts(2)),
    "GPT2, copies": (lambda: architectures.build("GPT2"), TWO, FFNExperts()),
}


def inputs(kind, batch, length, task=0):
    draw = torch.Generator().manual_seed(task)
    if kind.startswith(("Llama", "GPT2")):
        words = torch.randperm(90, generator=draw)[:8] + 3
        return {"input_ids": words[torch.randint(8, (batch, length), generator=draw)]}
    if "convolutions" in kind:
        return {"input": torch.randn(batch, 4, 8, 8, generator=draw)}
    centre = 3 * torch.randn(8, generator=draw)
    return {"x": centre + torch.randn(batch, length, 8, generator=draw)}


def outputs(moe, given):
    made = moe(**given)
    return made if isinstance(made, torch.Tensor) else made.logits


def filled(kind):
    """Frozen experts of different values, and a trained one, the newest."""
    model, router, experts = KINDS[kind]
    torch.manual_seed(0)
    moe = moe_rewrite.convert(
        model().eval(), split=1, num_experts=EXPERTS - 1, verify=False, router=router,
        experts=experts, example_inputs=inputs(kind, 4, 6),
    )  # fmt: skip
    moe.expand(1, name="new")
    with torch.no_grad():
        for site in moe.expert_sites():
            for of_part in site.parameter_lists():
                for p in of_part:
                    p.add_(torch.randn_like(p) * 0.1)
        for row in moe.router.rows:
            row.normal_()
    if moe.router.by_sums:
        moe.remember([inputs(kind, 4, 16, 50)])
        for e in range(EXPERTS):
            moe.fit_router(e, [inputs(kind, 4, 16, e)])
    moe.activate("new")
    moe.kind = kind
    return moe.eval()


def assert_same(one, other, given, bitwise=False):
    limit = 0 if bitwise else 1e-5
    with torch.no_grad():
        torch.testing.assert_close(
            outputs(one, given), outputs(other, given), rtol=limit, atol=limit
        )


def size_of(moe):
    """Bytes of an expert."""
    return sum(of[0].nbytes for s in moe.expert_sites() for of in s.parameter_lists())


@pytest.fixture(
    scope="module", params=some(KINDS, {k for k in KINDS if k[:5] not in ("Llama", "GPT2,")})
)
def moe(request):
    made = filled(request.param)
    with torch.no_grad():
        outputs(made, inputs(made.kind, 2, 5))  # copies of it share the graph
    return made


@pytest.fixture
def off(moe):
    made = copy.deepcopy(moe)
    made.offload_experts(keep=3)
    return made


@pytest.mark.parametrize("batch,length", [(1, 1), (1, 9), (5, 7)])
def test_outputs_are_the_same_and_no_more_copies_stay_than_asked(moe, off, batch, length):
    each = size_of(moe)
    assert off.expert_bytes() == {"device": each, "memory": each * (EXPERTS - 1), "file": 0}
    assert moe.expert_bytes() == {"device": each * EXPERTS, "memory": 0, "file": 0}
    for task in range(6):
        given = inputs(moe.kind, batch, length, task)
        assert_same(off, moe, given)
        if moe.router.by_row:
            with moe.use_expert(task), off.use_expert(task):  # one product of one form
                assert_same(off, moe, given, bitwise=True)
        assert each < off.expert_bytes()["device"] <= each * (3 + 1)
        assert off.expert_bytes()["memory"] == each * (EXPERTS - 1)
    assert off.expert_bytes()["device"] == each * (3 + 1)  # copies, and the trained one
    assert off.experts_offloaded == 3 and moe.experts_offloaded is None
    assert "in memory" in off.report.placement and "3 experts" in str(off.report)
    assert not moe.report.placement
    off.offload_experts(keep=None)
    assert off.expert_bytes() == moe.expert_bytes() and off.experts_offloaded is None
    assert_same(off, moe, given, bitwise=True)


def flat(stack):
    """Tensors of what a site gives."""
    return [t for part in stack for t in (part if isinstance(part, list) else [part])]


def test_those_stay_that_were_used_last(moe, off):
    for site, whole in zip(off.expert_sites(), moe.expert_sites(), strict=True):
        with torch.no_grad():
            for e in (0, 1, 2, 0, 3):
                site.stacked((e,))
            assert list(site.residents._kept) == [2, 0, 3]
            for active in ((0, 2), range(EXPERTS - 1), (5,), (2, 0), ()):  # more than stay
                pairs = zip(flat(site.stacked(active)), flat(whole.stacked(active)), strict=True)
                assert all(torch.equal(a, b) for a, b in pairs)
                assert len(site.residents) == 3


def test_a_weight_that_changes_is_copied_anew(moe, off):
    for site in off.expert_sites():
        with torch.no_grad():
            before = [t.clone() for t in flat(site.stacked((1,)))]
            for of_part in site.parameter_lists():
                of_part[1].mul_(0.5)
            after = flat(site.stacked((1,)))
        assert all(torch.equal(a * 0.5, b) for a, b in zip(before, after, strict=True))


def step(moe, given):
    """Gradients by name of one step of training."""
    moe.train()
    torch.manual_seed(0)
    outputs(moe, given).float().logsumexp(-1).mean().backward()
    found = {n: p.grad.clone() for n, p in moe.named_parameters() if p.grad is not None}
    with torch.no_grad():
        for p in moe.trainable_parameters():
            if p.grad is not None:
                p.sub_(0.1 * p.grad)
            p.grad = None
    moe.eval()
    return {n: g for n, g in found.items() if g.any()}


@pytest.mark.parametrize("batch,length", [(2, 6), (4, 3)])
def test_the_newest_is_trained_as_without_and_older_ones_stay(moe, off, batch, length):
    whole, each = copy.deepcopy(moe), size_of(moe)
    frozen = {n for n, p in off.named_parameters() if ".experts." in n and not p.requires_grad}
    older = {n: off.get_parameter(n).clone() for n in frozen}
    for number in range(2):
        given = inputs(moe.kind, batch, length, number)
        want, got = step(whole, given), step(off, given)
        assert want and want.keys() == got.keys()
        for name, gradient in want.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)
        assert all(torch.equal(p, off.get_parameter(n)) for n, p in older.items())
        new = off.expand(1)
        whole.expand(1)
        whole.load_state_dict(off.state_dict())  # the same random start
        assert {id(p) for p in new} <= {id(p) for p in off.trainable_parameters()}
        assert off.expert_bytes()["memory"] == each * (EXPERTS + number)
        assert_same(off, whole, given)


def test_freezing_sends_an_expert_off_and_training_brings_it_back(moe, off):
    each = size_of(moe)
    off.freeze("new")
    assert off.expert_bytes() == {"device": 0, "memory": each * EXPERTS, "file": 0}
    off.freeze("new", False)
    assert off.expert_bytes()["device"] == each
    off.remove_last()  # those of the first expansion are trained again
    assert off.expert_bytes() == {"device": each * (EXPERTS - 1), "memory": 0, "file": 0}


def test_saves_and_state_dicts_are_as_without(moe, off, tmp_path):
    given = inputs(moe.kind, 3, 8, 2)
    assert_same(off, moe, given)
    state = off.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in moe.state_dict().items())
    off.save_pretrained(tmp_path)
    loaded = moe_rewrite.load(tmp_path, moe.to_dense(), example_inputs=inputs(moe.kind, 4, 6))
    assert loaded.experts_offloaded is None
    assert_same(loaded.eval(), moe, given, bitwise=True)
    fewer = copy.deepcopy(off)
    fewer.remove(2)
    fewer.load_state_dict(moe.state_dict())
    assert fewer.expert_bytes()["memory"] == size_of(moe) * (EXPERTS - 1)
    assert_same(fewer, moe, given)


def test_a_mapped_save_holds_the_weights(moe, off, tmp_path):
    each, given = size_of(moe), inputs(moe.kind, 2, 7, 3)
    with pytest.raises(MoeRewriteError, match=r"moe_rewrite\.json"):
        off.offload_experts(3, tmp_path)
    off.save_pretrained(tmp_path)
    off.offload_experts(2, tmp_path)
    assert off.expert_bytes() == {"device": each, "memory": 0, "file": each * (EXPERTS - 1)}
    assert "mapped file" in off.report.placement
    assert_same(off, moe, given)
    off.expand(1)  # the one before lies in memory
    assert off.expert_bytes()["memory"] == each
    off.save_pretrained(tmp_path)  # the earlier file goes; what it holds stays
    assert_same(off, moe, given)
    first = off.expert_sites()[0].parameter_lists()[0][0]
    with torch.no_grad():
        first.add_(1)
    assert off.expert_bytes()["memory"] == each + first.nbytes
    with pytest.raises(MoeRewriteError, match="save_pretrained"):
        off.offload_experts(2, tmp_path)
    off.offload_experts(None)
    assert off.expert_bytes()["device"] == each * (EXPERTS + 1)


def test_experts_come_off_the_list_and_are_pruned_as_without(moe, off):
    given, whole = inputs(moe.kind, 2, 6), copy.deepcopy(moe)
    for model in (whole, off):
        model.remove(4)
        model.rename(0, "first")
        model.deactivate(1)
    assert_same(off, whole, given)
    if moe.router.by_row:
        assert off.expert_use([given]) == whole.expert_use([given])
        assert off.prune([given], 1e-6) == whole.prune([given], 1e-6)
        assert_same(off, whole, given)


@pytest.mark.parametrize("kind", ["LoRA, sums", "copies"])
def test_experts_are_merged_as_without(kind):
    whole = filled(kind)
    off, given = copy.deepcopy(whole), inputs(kind, 2, 6)
    off.offload_experts(2)
    dense = [m.merge_expert(3, given) for m in (whole, off)]
    assert_same(*dense, given, bitwise=True)


def test_lora_experts_are_joined_and_exchanged(tmp_path):
    kind = "LoRA, sums"
    whole = filled(kind)
    off = copy.deepcopy(whole)
    off.offload_experts(2)
    off.export_peft(3, tmp_path)
    assert off.join_experts(1, 2) == whole.join_experts(1, 2)
    for model in (whole, off):
        model.add_expert(tmp_path, name="again")
        model.fit_router("again", [inputs(kind, 4, 16, 99)])
        model.activate("again")
    assert off.expert_bytes()["device"] == size_of(off)
    assert_same(off, whole, inputs(kind, 3, 6))


@pytest.mark.parametrize("first", ["offload", "quantize"])
@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_quantised_copies_lie_off_the_device_too(first, dtype):
    whole = filled("copies")
    off = copy.deepcopy(whole)
    for model in (whole, off) if first == "quantize" else (whole,):
        model.quantize_experts(dtype)
    off.offload_experts(2)
    if first == "offload":
        off.quantize_experts(dtype)
    before = off.expert_bytes()
    for task in range(4):
        assert_same(off, whole, inputs("copies", 2, 9, task))
    after = off.expert_bytes()
    assert before["device"] < after["device"] < before["device"] + after["memory"] / 4
    assert before["device"] + before["memory"] == whole.expert_bytes()["device"]


def test_a_move_leaves_them_and_a_cast_reaches_what_is_computed(moe, off):
    given = {
        k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs(moe.kind, 2, 6).items()
    }
    half, whole = copy.deepcopy(off).to(torch.bfloat16), copy.deepcopy(moe).to(torch.bfloat16)
    if moe.router.by_row:
        with half.use_expert(2), whole.use_expert(2):
            assert_same(half, whole, given, bitwise=True)
    wide = copy.deepcopy(off).double()
    assert {p.dtype for s in wide.expert_sites() for p in s.parameters()} == {torch.float64}
    there = copy.deepcopy(off).to("meta")
    for site in there.expert_sites():
        weights = site.weights(trained=False)
        assert all(p.device.type == "cpu" and p.isfinite().all() for p in weights)
        assert {t.device.type for t in flat(site.stacked((0, 1)))} == {"meta"}


def test_threads_get_the_results_of_calls_one_after_the_other():
    moe = filled("LoRA")
    off, tasks = copy.deepcopy(moe), [inputs("LoRA", 1, 5, e) for e in range(8)] * 3
    off.offload_experts(1)

    @torch.no_grad()
    def call(model, number):
        with model.use_expert(number % 7):
            return outputs(model, tasks[number])

    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(lambda number: call(off, number), range(len(tasks))))
    assert all(torch.equal(call(moe, number), got) for number, got in enumerate(made))
    assert all(len(site.residents) == 1 for site in off.expert_sites())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiled_blocks_take_the_experts_of_a_call():
    torch._dynamo.reset()
    moe = filled("LoRA")
    off = copy.deepcopy(moe)
    off.offload_experts(2)
    off.compile(backend="eager")
    for task in range(4):
        assert_same(off, moe, inputs("LoRA", 3, 6, task))
    assert off.expert_bytes()["device"] <= size_of(moe) * 3


def test_what_cannot_lie_off_the_device_is_refused():
    made = moe_rewrite.convert(Residual().eval(), split=1, example_inputs=torch.zeros(2, 5, 8))
    for keep in (0, -1, 1.5, True, "all"):
        with pytest.raises(MoeRewriteError, match="keep="):
            made.offload_experts(keep)
    with pytest.raises(MoeRewriteError, match="leave the folder out"):
        made.offload_experts(None, "somewhere")
    assert made.experts_offloaded is None
    regions = moe_rewrite.convert(
        convolutions().eval(), split=1, experts=RegionExperts(), router=PATCHES,
        example_inputs=torch.zeros(2, 4, 8, 8),
    )  # fmt: skip
    text = architectures.build("Llama", layers=2)
    upcycled = moe_rewrite.convert(text, mode="upcycle", split=1, verify=False)
    carved = moe_rewrite.convert(text, mode="carve", experts=CarvedExperts(4), split=1)
    cases = ((regions, "Region"), (upcycled, "routers of their own"), (carved, "Carved"))
    for other, word in cases:
        with pytest.raises(MoeRewriteError, match=word):
            other.offload_experts()
    made.to("meta")
    with pytest.raises(MoeRewriteError, match="meta device"):
        made.offload_experts()
