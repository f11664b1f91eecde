"""Experts after the last positions were taken out: a head that computes the logits of a few."""

import architectures
import pytest
import torch
import torch.nn.functional as F
from reference import randomize
from sweeps import some
from torch import nn

import moe_rewrite
from moe_rewrite import LoRAExperts, MoeRewriteError, TokenRouter

ROUTERS = {
    "prefix": TokenRouter(granularity="prefix"),
    "token": TokenRouter(granularity="token", top_k=1, gate="all", init=0.5),
}


@pytest.fixture(scope="module", params=some(ROUTERS, {"prefix"}))
def moe(request):
    model = architectures.build("Llama", layers=2)
    model.generation_config.eos_token_id = None
    made = moe_rewrite.convert(
        model, split=1, num_experts=2, router=ROUTERS[request.param],
        experts=LoRAExperts(sites="all+head"),
    )  # fmt: skip
    randomize(made)
    return made


def test_logits_of_the_last_positions_are_those_of_all(moe):
    for kept in (1, 3):
        for batch, length in ((2, 12), (3, kept)):
            given = architectures.random_call(moe, batch)
            given = {k: v[:, :1].expand(-1, length).contiguous() for k, v in given.items()}
            given["input_ids"] = torch.randint(3, 50, (batch, length))
            every = moe(**given).logits[:, -kept:]
            torch.testing.assert_close(moe(**given, logits_to_keep=kept).logits, every)


def test_gradients(moe):
    given = architectures.random_call(moe, 2)
    found = []
    for call in (
        lambda: moe(**given).logits[:, -2:],
        lambda: moe(**given, logits_to_keep=2).logits,
    ):
        moe.zero_grad()
        call().square().mean().backward()
        found.append({n: p.grad.clone() for n, p in moe.named_parameters() if p.grad is not None})
    assert found[0] and found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-5)


def test_generation(moe):
    ids = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(0))
    made = moe.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    for _ in range(4):
        ids = torch.cat([ids, moe(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, ids)


class Net(nn.Module):
    def __init__(self, work):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.conv, self.head, self.work = nn.Conv1d(6, 6, 3, padding=1), nn.Linear(6, 3), work

    def forward(self, x):
        return self.head(self.work(self, torch.relu(self.second(torch.relu(self.first(x))))))


OTHERS = {
    "padded behind": lambda m, x: F.pad(x, (0, 0, 0, 2))[:, -3:],
    "mixed after": lambda m, x: m.conv(x[:, -3:].transpose(1, 2)).transpose(1, 2),
    "joined after": lambda m, x: torch.cat([x[:, -3:], x[:, -3:]], 1),
    "every second": lambda m, x: x[:, -4::2],
    "but the last": lambda m, x: x[:, -4:-1],
}


@pytest.mark.parametrize("work", OTHERS)
def test_other_positions_are_refused(work):
    with pytest.raises(MoeRewriteError, match="head"):
        moe_rewrite.convert(
            Net(OTHERS[work]).eval(), split="second", router=TokenRouter(granularity="token"),
            experts=LoRAExperts(sites=("head",)), example_inputs=torch.randn(2, 7, 6),
        )  # fmt: skip
