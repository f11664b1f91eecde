"""Training a converted Llama in two processes, sharded by FSDP2; run by test_sharded in each."""

import os
import sys
import warnings

import torch
import torch.distributed as dist

import moe_rewrite
from moe_rewrite import MoeRewriteError

IDS = torch.randint(0, 97, (4, 12), generator=torch.Generator().manual_seed(9))
STEPS = 3


def build(tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        vocab_size=97, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def converted(tied):
    moe = moe_rewrite.convert(build(tied), split=1)
    moe.expand(1)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in moe.trainable_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return moe.train()


def optimizer_of(moe):
    return torch.optim.SGD([p for p in moe.parameters() if p.requires_grad], lr=0.1)


def train(moe, parts):
    """Losses of the first part in steps on the mean over the parts."""
    optimizer, losses = optimizer_of(moe), []
    for _ in range(STEPS):
        found = [moe(input_ids=part, labels=part).loss for part in parts]
        torch.stack(found).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(found[0].item())
    return losses


def work(rank, port, folder):
    """Every case; rank 0 writes losses and what was saved."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh, found = init_device_mesh("cpu", (2,)), {}
    for tied in (False, True):
        for warm in (False, True):
            moe, part = converted(tied), IDS[2 * rank : 2 * rank + 2]
            if warm:
                moe(input_ids=part, labels=part)
            for block in [*moe.shallow, *moe.deep]:
                fully_shard(block, mesh=mesh)
            fully_shard(moe, mesh=mesh)
            found[tied, warm] = train(moe, [part])
            moe.save_pretrained(f"{folder}/{tied}-{warm}")
            try:
                moe.expand()
            except MoeRewriteError as error:
                found["expand"] = str(error)
            dist.barrier()
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    work(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
