"""Experts whose weights lie off the device until a call uses them. The device is the CPU here, so that
what lies on it is counted as the copies that are kept."""

import copy

import pytest
import torch

import moe_rewrite
from moe_rewrite import MoeRewriteError
from tests.helpers.offloaded import EXPERTS, KINDS, assert_same, filled, inputs, outputs, size_of
from tests.helpers.sweeps import some


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
