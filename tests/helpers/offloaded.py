"""Models with many experts, to compare with copies whose experts lie off the device."""

import architectures
import torch
from networks import Residual
from torch import nn

import moe_rewrite
from moe_rewrite import FFNExperts, LoRAExperts, PatchRouter, TokenRouter
from tests.helpers.reference import randomize

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
    randomize(moe)
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
