"""Experts off the device beside the other methods of a model, in threads and compiled; what is refused."""

import copy
from concurrent.futures import ThreadPoolExecutor

import architectures
import pytest
import torch
from networks import Residual

import moe_rewrite
from moe_rewrite import CarvedExperts, MoeRewriteError, RegionExperts
from tests.helpers.offloaded import (
    PATCHES,
    assert_same,
    convolutions,
    filled,
    inputs,
    outputs,
    size_of,
)


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
