"""Twenty tasks in a row: work and memory grow linearly with the experts, step by step."""

import architectures
import cnns
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import moe_rewrite
from moe_rewrite import LoRAExperts, TokenRouter


def work(moe, call):
    """(FLOPs of a forward call with all experts, of a training step of the newest one alone)."""
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        moe.eval()(**call)
    with FlopCounterMode(display=False) as step, moe.use_expert(moe.num_experts - 1):
        out = moe.train()(**call)
        getattr(out, "logits", out).sum().backward()
    return forward.get_total_flops(), step.get_total_flops()


def size(moe):
    """(bytes of what conversion added, those of the record from which `remove_last` goes back)."""
    named = {k: v for k, v in moe.state_dict().items() if k.startswith("moe_rewrite.")}
    kept = {k: v.numel() * v.element_size() for k, v in named.items()}
    record = sum(n for k, n in kept.items() if ".before." in k)
    return sum(kept.values()) - record, record


@pytest.mark.parametrize(("name", "fit"), [("Llama", "analytic"), ("ResNet", "gradient")])
def test_growth_is_linear_in_the_experts(name, fit):
    text = name == "Llama"
    model = architectures.build(name) if text else cnns.build(name)
    call = {"input_ids": torch.randint(3, 90, (2, 9)), "use_cache": False} if text else {
        "x": torch.randn(2, 3, 32, 32)
    }  # fmt: skip
    router = TokenRouter(fit=fit, granularity="prefix" if text else "sequence", projection=32)
    split = 1 if text else "layer3"
    moe = moe_rewrite.convert(
        model, split=split, router=router, experts=LoRAExperts(4), verify=False
    )
    grown = {}
    for number in range(1, 21):
        if number > 1:
            moe.expand(1, classes=None if text else 2)
        if fit == "analytic":
            moe.fit_router(number - 1, [{k: v for k, v in call.items() if k != "use_cache"}])
        moe.activate(number - 1)
        if number in (2, 3, 10, 20):
            grown[number] = (*work(moe, call), *size(moe))
    for two, three, ten, twenty in list(zip(*grown.values(), strict=True))[:3]:
        slope = three - two
        assert ten - two == 8 * slope >= 0 and twenty - two == 18 * slope
    # every expert's record holds the rows of the router as they were before it: fp32 and two flags
    assert grown[20][3] == 190 * 4 * (moe.router.size + 2)
