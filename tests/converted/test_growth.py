"""Twenty tasks in a row: work and memory grow linearly with the experts."""

import architectures
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import moe_rewrite
from moe_rewrite import LoRAExperts, TokenRouter

pytestmark = pytest.mark.timeout(600)
CALL = {"input_ids": torch.arange(3, 21).view(2, 9), "use_cache": False}


def work(moe):
    """(FLOPs of a forward call with all experts, of a training step of the newest one alone)."""
    counts = []
    for mode, expert in (("eval", None), ("train", moe.num_experts - 1)):
        getattr(moe, mode)()
        moe(**CALL)  # captures the graph, which is not counted
        with FlopCounterMode(display=False) as counted:
            if expert is None:
                moe(**CALL)
            else:
                with moe.use_expert(expert):
                    moe(**CALL).logits.sum().backward()
        counts.append(counted.get_total_flops())
    return counts


def size(moe):
    """(bytes of what conversion added, those of the record from which `remove_last` goes back)."""
    named = {k: v for k, v in moe.state_dict().items() if k.startswith("moe_rewrite.")}
    named.pop("moe_rewrite._extra_state")  # text: the experts' names
    kept = {k: v.numel() * v.element_size() for k, v in named.items()}
    record = sum(n for k, n in kept.items() if ".before." in k)
    return sum(kept.values()) - record, record


def test_growth_is_linear_in_the_experts():
    router = TokenRouter(fit="analytic", granularity="prefix", projection=32)
    moe = moe_rewrite.convert(
        architectures.build("Llama"), split=1, router=router, experts=LoRAExperts(4), verify=False
    )
    grown = {}
    for number in range(1, 21):
        if number > 1:
            moe.expand(1)
        moe.activate(number - 1)
        if number in (2, 3, 10, 20):
            grown[number] = (*work(moe), *size(moe))
    forward, step, added, record = (
        dict(zip(grown, x, strict=True)) for x in zip(*grown.values(), strict=True)
    )
    for figure in (forward, step, added):
        slope = figure[3] - figure[2]
        assert figure[10] - figure[2] == 8 * slope and figure[20] - figure[2] == 18 * slope
    assert forward[3] > forward[2] and added[3] > added[2] and step[3] == step[2]
    # every expert's record holds two flags of each expert before it: rows are solved again
    assert record[20] == 190 * 4 * 2
