"""Training an analytic router in two processes; run by test_training_sums in each."""

import copy
import sys
import warnings

import torch
import torch.distributed as dist
from torch import nn

import moe_rewrite
from moe_rewrite import LoRAExperts, TokenRouter

WIDTH, STEPS = 8, 3
BATCHES = torch.randn(STEPS, 8, WIDTH, generator=torch.Generator().manual_seed(3))
BEFORE = [torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(4)) + 2]


def converted():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(3)]
    router = TokenRouter(fit="analytic", projection=16)
    moe = moe_rewrite.convert(
        nn.Sequential(*layers), split=1, router=router, experts=LoRAExperts(2),
        example_inputs=BEFORE[0],
    )  # fmt: skip
    moe.remember(BEFORE)
    return moe.train()


def train(model, part):
    for x in BATCHES:
        model(x[part]).sum().backward()


def rows(moe):
    from moe_rewrite.utils.sharded import gathered

    return torch.stack([moe.router.frozen, *map(gathered, moe.router.rows)]).detach()


def work(rank, port, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    part, plain = slice(4 * rank, 4 * rank + 4), converted()
    sharded = copy.deepcopy(plain)
    train(DistributedDataParallel(plain), part)
    mesh = init_device_mesh("cpu", (2,))
    for block in [*sharded.shallow, *sharded.deep, sharded]:
        fully_shard(block, mesh=mesh)
    train(sharded, part)
    if rank == 0:
        plain.eval()  # the other waits for nothing
    found = {"DDP": rows(plain), "FSDP2": rows(sharded.eval())}
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    work(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
