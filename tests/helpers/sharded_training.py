"""Training small converted Llamas in several processes; run by test_sharded in each of them."""

import copy
import datetime
import functools
import os
import signal
import sys
import warnings
from contextlib import ExitStack
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import moe_rewrite
from moe_rewrite import MoeRewriteError, TokenRouter

IDS = torch.randint(0, 97, (4, 12), generator=torch.Generator().manual_seed(9))
MODES = {False: "pmoe", True: "pmoe", "upcycled": "upcycle"}


def build(tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        vocab_size=97, tie_word_embeddings=bool(tied),
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def converted(tied):
    """tied: False, True, or "upcycled": tied, every weight trained, and experts that get no rows."""
    router = "auto" if tied == "upcycled" else TokenRouter(granularity="prefix")  # trained, divided
    moe = moe_rewrite.convert(build(tied), MODES[tied], split=1, router=router)
    if tied != "upcycled":
        moe.expand(1)
    move(moe, 4)
    return moe.train()


def move(moe, seed):
    """Trained parameters away from where they start, alike in all processes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in moe.trainable_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def train(moe, parts, steps=3, expand_at=(), wrap=lambda moe: moe, rate=0.1):
    """Losses of the first part, in steps on the mean over the parts, and the last gradients."""
    called, losses = wrap(moe), []
    optimizer = torch.optim.SGD(moe.trainable_parameters(), lr=rate)
    for step in range(steps):
        if step in expand_at:
            torch.manual_seed(7)
            moe.expand()
            called = wrap(moe)
            optimizer = torch.optim.SGD(moe.trainable_parameters(), lr=rate)
        optimizer.zero_grad()
        found = [called(input_ids=part, labels=part).loss for part in parts]
        torch.stack(found).mean().backward()
        optimizer.step()
        losses.append(found[0].item())
    return losses, {n: whole(p.grad) for n, p in moe.named_parameters() if p.grad is not None}


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


# -- ways to divide a model, each given the mesh ---------------------------------------------------


def by_block(moe, mesh, **options):
    from torch.distributed.fsdp import fully_shard

    for block in [*moe.shallow, *moe.deep]:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(moe, mesh=mesh, **options)


def in_the_tree(moe, mesh):
    """Modules of the tree of names, which never run: frozen weights, and trained experts."""
    from torch.distributed.fsdp import fully_shard

    for name in ("model", "lm_head", "moe_rewrite"):
        fully_shard(moe.get_submodule(name), mesh=mesh)
    return moe


def by_accelerate(moe, mesh):
    """What accelerate's FSDP2 plugin does to a model in `prepare`, which it does on GPUs only."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(2, auto_wrap_policy="transformer_based_wrap")
    names = SimpleNamespace(fsdp_dim_names=mesh.mesh_dim_names)
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), torch_device_mesh=mesh, mixed_precision="no",
        parallelism_config=names, device=torch.device("cpu"), is_main_process=False,
    )  # fmt: skip
    return fsdp2_prepare_model(accelerator, moe)


CASES = {  # (tied, captured before it is divided, how, steps, expand before these)
    "by block": (False, False, by_block, 20, (7, 14)),
    "tied": (True, False, by_block, 3, ()),
    "tied, warm": (True, True, by_block, 3, ()),
    "accelerate": ("upcycled", True, by_accelerate, 3, ()),
    "in the tree": (False, True, in_the_tree, 3, ()),
    "upcycled": ("upcycled", True, by_block, 3, ()),
    "hybrid": (False, True, by_block, 20, (7, 14)),
    "ddp": (False, True, None, 20, (7, 14)),
    "upcycled ddp": ("upcycled", True, None, 3, ()),
}


def warmed(moe):
    """A copy that has its training graph."""
    moe = copy.deepcopy(moe)
    moe(input_ids=IDS[:2], labels=IDS[:2])
    return moe


def run_case(moe, name, part, mesh):
    _, _, divide, steps, expand_at = CASES[name]
    if divide is None:
        return train(moe, [part], steps, expand_at, DistributedDataParallel), moe
    moe = divide(moe, mesh)
    result = train(moe, [part], steps, expand_at), moe
    unlike = [n for n, p in moe.named_parameters(remove_duplicate=False) if not is_divided(n, p)]
    assert not unlike, unlike
    return result


def is_divided(name, parameter):
    return hasattr(parameter, "full_tensor") or ".before." in name


def message(call, *args):
    try:
        call(*args)
    except MoeRewriteError as error:
        return str(error)
    return "no error"


def cases(rank, world, folder, flat):
    """Every case; rank 0 writes losses, gradients and what was saved."""
    import tensor_parallel_training as parallel
    from torch.distributed.device_mesh import init_device_mesh

    hybrid = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("copy", "shard"))
    part, found = IDS.chunk(world)[rank], {}
    for tied in MODES:
        made = converted(tied)
        warm = warmed(made)
        for name in (n for n, case in CASES.items() if case[0] == tied):
            moe = copy.deepcopy(warm if CASES[name][1] else made)
            found[name], moe = run_case(moe, name, part, hybrid if name == "hybrid" else flat)
            moe.save_pretrained(f"{folder}/{name}", model_card=False)
            if name == "ddp":
                wrapped = DistributedDataParallel(moe)
                moe.expand()
                found["ddp expand"] = message(wrapped, part)
            if name == "by block":
                checkpoint("save", moe, folder)
                found["remove"] = message(moe.remove, 0)
                found["convert"] = message(moe_rewrite.convert, torch.nn.ModuleList(moe.deep))
        if tied is False:
            found["bytes"] = counted(copy.deepcopy(warm), flat, part)
    loaded = parallel.loaded_with_a_plan(rank, world, folder)
    found["tensor parallel"] = message(moe_rewrite.convert, loaded)
    parallel.case("analytic router", rank, folder, flat)
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    if world == 2:
        piped(rank, folder, flat)


def counted(moe, mesh, part):
    """Bytes that a process holds and receives in a step, and those that docs/many_gpus.md says."""
    by_block(moe, mesh)
    train(moe, [part], 1)
    new = hasattr(dist, "all_gather_single")  # other names before PyTorch 2.13
    gather = "all_gather_single" if new else "all_gather_into_tensor"
    reduce = "reduce_scatter_single" if new else "reduce_scatter_tensor"
    sent = {gather: 0, reduce: 0}
    with ExitStack() as patches:
        for name in sent:
            patches.enter_context(mock.patch.object(dist, name, counting(name, sent)))
        train(moe, [part], 1)
    n = mesh.size()
    trained = sum(padded(p, n) for p in moe.trainable_parameters())
    blocks = {b: sum(padded(p, n) for p in b.parameters()) for b in [*moe.shallow, *moe.deep]}
    weights = sum(padded(p, n) for p in moe.parameters())
    deep = sum(blocks[b] for b in [moe.shallow[-1], *moe.deep])
    says = {"gathered": weights + deep, "reduced": trained}
    found = {"gathered": sent[gather], "reduced": sent[reduce] * n}
    moe.expand()
    return found | held_in_training(moe, part), says | said_of_training(moe, n)


def held_in_training(moe, part):
    """Bytes that a process holds after a step: weights, gradients, the optimizer's states."""
    optimizer = torch.optim.AdamW(moe.trainable_parameters())
    optimizer.zero_grad()
    moe(input_ids=part, labels=part).loss.backward()
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    each = {
        "weights": weights_of(moe), "states": states,
        "gradients": [p.grad for p in moe.trainable_parameters()],
    }  # fmt: skip
    return {name: sum(t.to_local().nbytes for t in tensors) for name, tensors in each.items()}


def weights_of(moe):
    """All but the router's records, which stay whole."""
    return [p for name, p in moe.named_parameters() if ".before." not in name]


def said_of_training(moe, n):
    weights, trained = (
        sum(padded(p, n) for p in tensors) // n
        for tensors in (weights_of(moe), moe.trainable_parameters())
    )
    return {"weights": weights, "states": 2 * trained, "gradients": trained}


def padded(parameter, n):
    rows = len(parameter)
    return -(-rows // n) * n * parameter.nbytes // rows if rows else 0


def counting(name, sent):
    original = getattr(dist, name)

    def counted(*args, **kwargs):
        sent[name] += (args[0] if args else next(iter(kwargs.values()))).nbytes
        return original(*args, **kwargs)

    return counted


def piped(rank, folder, mesh):
    """One half in each process; the second one writes losses and gradients."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    moe = warmed(converted(False))
    stage = PipelineStage(moe.pipeline_stages()[rank], rank, 2, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, 2, loss_fn=functools.partial(loss_of, moe))
    optimizer = torch.optim.SGD(moe.trainable_parameters(), lr=0.1)
    losses: list[float] = []
    for _ in range(3):
        optimizer.zero_grad()
        found: list[torch.Tensor] = []
        of_last = {"target": IDS, "losses": found} if rank else {}
        schedule.step(**of_last, input_ids=IDS)
        optimizer.step()
        losses += [loss.item() for loss in found[:1]]
    gradients = {n: p.grad.clone() for n, p in moe.named_parameters() if p.grad is not None}
    assert rank or not gradients
    if rank:
        torch.save((losses, gradients), f"{folder}/piped.pt")


def loss_of(moe, logits, ids):
    return moe.host.module.loss_function(logits, ids, moe.config.vocab_size)


def checkpoint(what, moe, folder):
    """Save or load by torch.distributed.checkpoint, by any number of processes."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    state = get_model_state_dict(moe)
    alone = not dist.is_initialized()
    getattr(dcp, what)(state, checkpoint_id=f"{folder}/distributed", no_dist=alone)
    if what == "load":
        set_model_state_dict(moe, state)


def load(rank, world, folder, mesh):
    """What more processes saved, loaded by these and saved as one process would."""
    moe = converted(False)
    for _ in range(2):
        moe.expand()
    by_block(moe, mesh)
    checkpoint("load", moe, folder)
    moe.save_pretrained(f"{folder}/loaded by {world}", model_card=False)


def killed(rank, world, folder, mesh, dies=True):
    """Steps with a save after each, of which the last process dies in the third."""
    moe, before = made_or_saved(folder)
    by_block(moe.train(), mesh)
    for step in range(before, 5):
        if dies and step == 2 and rank == world - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        losses, _ = train(moe, [IDS.chunk(world)[rank]], 1)
        moe.save_pretrained(f"{folder}/run", model_card=False)
        if rank == 0:
            torch.save({"steps": step + 1, "loss": losses[0]}, f"{folder}/step.pt")


def made_or_saved(folder):
    """The model of a run and the steps that it has made: from its last save, if there is one."""
    if not os.path.exists(f"{folder}/step.pt"):
        return converted(False), 0
    steps = torch.load(f"{folder}/step.pt")["steps"]
    return moe_rewrite.load(f"{folder}/run", build(False)), steps


def resumed(rank, world, folder, mesh):
    killed(rank, world, folder, mesh, dies=False)


def work(rank, world, port, folder, what):  # what: a function, or the name of one here
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    wait = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=wait)
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("s",))
    globals().get(what, what)(rank, world, folder, mesh)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    work(*map(int, sys.argv[1:4]), *sys.argv[4:])
