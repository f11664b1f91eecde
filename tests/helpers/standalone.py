"""Small models with trained LoRA experts, their standalone folders, and reading these elsewhere."""

import os
import subprocess
import sys
from contextlib import ExitStack
from functools import cache

import torch
from architectures import build

import moe_rewrite
from moe_rewrite import LoRAExperts

READER = """
import sys
sys.modules["moe_rewrite"] = None
import torch, transformers
for folder, auto in zip(sys.argv[1::2], sys.argv[2::2]):
    given = torch.load(folder + "/calls.pt")
    model, info = getattr(transformers, auto).from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values()), info
    with torch.no_grad():
        made = [dict(model.eval()(**call)) for call in given["calls"]]
        made = [{k: v for k, v in m.items() if isinstance(v, torch.Tensor)} for m in made]
        made += [model.generate(**call) for call in given["generate"]]
    torch.save(made, folder + "/made.pt")
"""
EVERY = torch.Generator().manual_seed(0)
IDS = torch.randint(3, 97, (2, 40), generator=EVERY)
PIXELS = torch.randn(2, 3, 16, 16, generator=EVERY)


def calls(model):
    """Other lengths than those that a save compares, and batches padded on either side."""
    if model.main_input_name == "pixel_values":
        return [{"pixel_values": PIXELS}]
    made = [
        {"input_ids": IDS[:, :n], "attention_mask": torch.ones(2, n).long()} for n in (2, 7, 40)
    ]
    for side in (slice(0, 3), slice(-4, None)):
        mask = torch.ones(2, 12).long()
        mask[1, side] = 0
        made.append({"input_ids": IDS[:, :12], "attention_mask": mask})
    return made


def others(model):
    """A call whose rows are unlike those of `calls`."""
    if model.main_input_name == "pixel_values":
        return {"pixel_values": -PIXELS}
    ids = (IDS[:, :12] + 40) % 94 + 3
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def loss(out):
    return sum(v.float().square().mean() for v in out.values() if isinstance(v, torch.Tensor))


def train(moe):
    """A few steps of the newest experts on more than the first positions, which an analytic router
    of prefixes leaves to the frozen model."""
    moe.train()
    optimizer = torch.optim.Adam(moe.trainable_parameters(), 0.05)
    of = calls(moe.to_dense())
    for _ in range(3):
        loss(moe(**of[min(1, len(of) - 1)], return_dict=True)).backward()
        optimizer.step()
        optimizer.zero_grad()
    moe.eval()


@cache
def trained(name, router="auto"):
    """A model with two trained experts; not to be changed."""
    moe = converted(name, router)
    if moe.router.by_sums and moe.router.spec.base:
        moe.remember([others(moe.to_dense())])
    train(moe)
    moe.expand(1)
    train(moe)
    return moe


@cache
def filled(name, router="auto"):
    """The same with random parameters, which costs no training graph; not to be changed."""
    moe = converted(name, router)
    moe.expand(1)
    moe.activate(1)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in (*moe.router.rows, *(p for s in moe.expert_sites() for p in s.parameters())):
            p.add_(0.1 * torch.randn_like(p))
    if moe.router.by_sums:
        for expert, batch in enumerate(calls(moe.to_dense())[1:3]):
            moe.fit_router(expert, [batch])
    return moe


def converted(name, router):
    experts = LoRAExperts(rank=4)
    return moe_rewrite.convert(build(name), split=1, router=router, experts=experts)


def opened(stack: ExitStack, folder):
    """The model of a folder, in this process."""
    from moe_rewrite.frontend.standalone import classes

    module = stack.enter_context(classes.imported((folder / classes.FILE).read_text()))
    config = getattr(module, classes.CONFIG).from_pretrained(folder)
    return getattr(module, config.architectures[0]).from_pretrained(folder).eval()


def read_elsewhere(folders):
    """What the models of folders compute of their calls.pt, in a process without this package.

    folders: folder -> name of transformers' auto class.
    """
    place = next(iter(folders)).parent
    keep = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    pairs = [str(x) for pair in folders.items() for x in pair]
    command = [sys.executable, "-c", READER, *pairs]
    done = subprocess.run(
        command, cwd=place, env=keep | {"HF_MODULES_CACHE": str(place / "modules")},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / "made.pt") for folder in folders]
