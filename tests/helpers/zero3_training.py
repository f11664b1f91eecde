"""Training small converted Llamas under DeepSpeed's ZeRO stage 3; run by test_zero_stage_3 in each
process."""

import os
import sys
import warnings

import sharded_training as sharded
import torch
from sharded_training import IDS

import moe_rewrite

CASES = {  # (model, steps, ZeRO keeps weights of up to so many elements whole)
    "gradient router": (False, 20, 0),
    "analytic router": ("analytic", 20, 0),
    "tied": (True, 3, 0),
    "upcycled": ("upcycled", 3, 0),
    "small weights kept whole": (False, 3, 100),
}
RATE = 0.02  # at 0.1 the loss of the analytic router's model goes up and down, and errors grow


def converted(kind):
    if kind != "analytic":
        return sharded.converted(kind)
    moe = moe_rewrite.convert(sharded.build(False), split=1)
    moe.expand(1)
    sharded.move(moe, 4)
    return moe.train()


def settings(keeps):
    stage = {"stage": 3, "stage3_param_persistence_threshold": keeps}
    return {"train_micro_batch_size_per_gpu": 2, "zero_optimization": stage,
            "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0}  # fmt: skip


def initialized(moe, keeps=0):
    import deepspeed

    optimizer = torch.optim.SGD(moe.trainable_parameters(), lr=RATE)
    return deepspeed.initialize(model=moe, optimizer=optimizer, config=settings(keeps))[0]


def train(engine, part, steps):
    losses = []
    for _ in range(steps):
        loss = engine(input_ids=part, labels=part).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def evaluated(moe):
    """Logits in evaluation, and (analytic router) tokens that are generated."""
    moe.eval()
    tokens = (
        moe.generate(IDS[:, :5], max_new_tokens=4, do_sample=False) if moe.router.by_sums else 0
    )
    return moe(input_ids=IDS).logits, torch.as_tensor(tokens)


def cases(rank, world, folder, mesh):
    part, found = IDS.chunk(world)[rank], {}
    for name, (kind, steps, keeps) in CASES.items():
        moe = converted(kind)
        losses = train(initialized(moe, keeps), part, steps)
        whole = [n for n, p in moe.named_parameters() if p.numel() > max(keeps, 0)]
        found[name] = losses, whole, evaluated(moe)
        moe.save_pretrained(f"{folder}/{name}", model_card=False)
    found["refused"] = refusals(part)
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")


def refusals(part):
    from deepspeed.utils import set_z3_leaf_modules

    moe = converted(False)
    initialized(moe)
    refused = {"expand": sharded.message(moe.expand), "remove": sharded.message(moe.remove, 0)}
    checkpointed, leaf = converted(False), converted(False)
    checkpointed.gradient_checkpointing_enable()
    refused["checkpointing"] = sharded.message(initialized(checkpointed), part)
    set_z3_leaf_modules(leaf, [type(block) for block in leaf.deep])
    refused["leaf module"] = sharded.message(initialized(leaf), part)
    return refused


def on_a_cpu():
    """DeepSpeed without its compiled operators, which a CPU needs in no step of these."""
    os.environ.update(DS_ACCELERATOR="cpu", CCL_PROCESS_LAUNCHER="none")
    import deepspeed  # noqa: F401

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    torch.Tensor.record_stream = lambda *_: None


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    rank, world, port, folder, _ = sys.argv[1:]
    on_a_cpu()
    sharded.work(int(rank), int(world), int(port), folder, cases)
