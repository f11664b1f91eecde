"""Small converted models with their weights divided by their plans; run by test_tensor_parallel."""

import json
import sys
import warnings
from pathlib import Path
from unittest import mock

import sharded_training as sharded
import torch
import torch.distributed as dist

import moe_rewrite
from moe_rewrite import LoRAExperts, TokenRouter
from moe_rewrite.utils import collectives

TRAINED = TokenRouter(granularity="prefix", fit="gradient")
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 97, "pad_token_id": 0,
}  # fmt: skip
NEOX = {name: SIZES[name] for name in SIZES if name != "num_key_value_heads"}


def of(name, **sizes):
    """A model of transformers, by the name of its class."""
    import transformers

    torch.manual_seed(0)
    kind = getattr(transformers, name)
    return kind(kind.config_class(**sizes)).eval()


def llama(tied):
    return lambda: sharded.build(tied)


CASES = {  # (dense model, options of convert, steps, expand before these)
    "analytic router": (llama(True), {}, 3, (2,)),
    "analytic, long": (llama(True), {}, 20, (7, 14)),
    "trained router, long": (llama(False), {"router": TRAINED}, 20, (7, 14)),
    "experts at the head": (
        llama(False),
        {
            "router": TokenRouter(top_k=2, fit="gradient"), "num_experts": 3,
            "experts": LoRAExperts(rank=4, sites="all+head"),
        },
        3, (),
    ),
    "norms of heads": (lambda: of("Qwen3ForCausalLM", **SIZES, head_dim=8), {}, 3, (1,)),
    "gathered": (lambda: of("Phi3ForCausalLM", **SIZES), {"router": TRAINED}, 3, (1,)),
    "biases": (lambda: of("GPTNeoXForCausalLM", **NEOX), {"router": TRAINED}, 3, (1,)),
    "scaled embedding": (
        lambda: of("Gemma3ForCausalLM", **SIZES, head_dim=8), {"router": TRAINED}, 3, (1,),
    ),
}  # fmt: skip


def converted(name):
    build, options, _, _ = CASES[name]
    moe = moe_rewrite.convert(build(), split=1, **options)
    sharded.move(moe, 4)
    return moe.train()


def trained(moe, name):
    """What is compared with one process."""
    _, _, steps, expand_at = CASES[name]
    losses, gradients = sharded.train(moe, [sharded.IDS], steps, expand_at)
    if moe.router.by_sums:
        moe.remember([{"input_ids": sharded.IDS.flip(1)}])
    moe.eval()
    logits = moe(input_ids=sharded.IDS).logits.detach()
    found = {"losses": losses, "gradients": gradients, "logits": logits}
    if name != "experts at the head":  # which generate() does not run: it reads the last rows only
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        found["tokens"] = moe.generate(sharded.IDS[:, :4], **options)
    return found


def case(name, rank, folder, mesh):
    """rank 0 writes what is compared, and all of them the save."""
    moe = converted(name)
    moe.tensor_parallel(mesh)
    found = trained(moe, name)
    found["held"], found["sent"] = held(moe), sent(moe)
    found["again"] = sharded.message(moe.tensor_parallel, mesh)
    moe.save_pretrained(f"{folder}/{name}", model_card=False)
    moe.save_pretrained(f"{folder}/{name}, whole", model_card=False, save_only_added=False)
    if rank == 0:
        torch.save(found, f"{folder}/{name}.pt")


def assert_alike(name, folder, world):
    """One process computes the same, and saves the same."""
    found = torch.load(Path(folder) / f"{name}.pt")
    alone = converted(name)
    for what, value in trained(alone, name).items():  # tokens are whole numbers
        torch.testing.assert_close(found[what], value, rtol=0, atol=1e-5, msg=what)
    assert "before it is sharded" in found["again"]
    if name == "analytic router":
        divided, whole = found["held"]
        plan = sum(p.nbytes for p in dense_of(alone) if p.ndim > 1)
        assert whole == sum(p.nbytes for p in dense_of(alone)) - plan
        assert plan / world <= divided <= plan / world + 4 * world * 32  # the vocabulary is odd
        assert found["sent"] == said(alone)
    sent(alone)  # the same training once more
    alone.save_pretrained(Path(folder) / "alone", model_card=False)
    assert_same_save(Path(folder) / name, Path(folder) / "alone")
    both = moe_rewrite.load(Path(folder) / f"{name}, whole", CASES[name][0]())
    torch.testing.assert_close(both.state_dict(), alone.state_dict(), rtol=1e-5, atol=1e-5)


def dense_of(moe):
    return [p for n, p in moe.named_parameters() if not n.startswith("moe_rewrite.")]


def held(moe):
    """Bytes of dense weights in this process's memory: of those that are divided, and of others."""
    divided = [p.to_local() for p in dense_of(moe) if hasattr(p, "full_tensor")]
    whole = [p for p in dense_of(moe) if not hasattr(p, "full_tensor")]
    return [sum(t.untyped_storage().nbytes() for t in tensors) for tensors in (divided, whole)]


def sent(moe):
    """Bytes that one step sums over the processes."""
    counted = [0]

    def summed(x, group):
        counted[0] += x.nbytes
        return original(x, group)

    original = collectives.summed_over
    with mock.patch.object(collectives, "summed_over", summed):
        sharded.train(moe.train(), [sharded.IDS], 1)
    moe.eval()
    return counted[0]


def said(moe):
    """The same by docs/many_gpus.md, without gates, which an analytic router does not train."""
    tokens, width, layers, deep = sharded.IDS.numel(), 32, 3, 2
    values = (2 * layers + 1 + 2 * deep) * tokens * width + tokens * 97
    return 4 * (values + sum(p.numel() for p in moe.trainable_parameters()))


def assert_same_save(one, other):
    from safetensors.torch import load_file

    (tensors,), (others,) = (list(map(load_file, f.glob("*.safetensors"))) for f in (one, other))
    torch.testing.assert_close(tensors, others, rtol=1e-5, atol=1e-5)  # sums of a router are large
    for file in other.glob("*.json"):
        facts, expected = (json.loads((f / file.name).read_text()) for f in (one, other))
        of_tensors = {"sha256", "meta_sha256"}
        assert {k: v for k, v in facts.items() if k not in of_tensors} == {
            k: v for k, v in expected.items() if k not in of_tensors
        }


def loaded_with_a_plan(rank, world, folder):
    """A model that transformers divided by its class's plan as it was loaded."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    if rank == 0:
        sharded.build(False).save_pretrained(f"{folder}/dense")
    dist.barrier()
    return AutoModelForCausalLM.from_pretrained(
        f"{folder}/dense", distributed_config=DistributedConfig(tp_size=world)
    )


def every(rank, world, folder, mesh):
    """All cases but the one that test_sharded runs."""
    for name in list(CASES)[1:]:
        case(name, rank, folder, mesh)
    one = SIZES | {"num_key_value_heads": 1}
    moe = moe_rewrite.convert(of("LlamaForCausalLM", **one), split=1)
    refused = sharded.message(moe.tensor_parallel, mesh)
    if rank == 0:
        torch.save(refused, f"{folder}/refused.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sharded.work(*map(int, sys.argv[1:4]), sys.argv[4], every)
