"""transformers' continuous batching: requests of several lengths, packed into one sample."""

import copy

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

import moe_rewrite
from moe_rewrite import FFNExperts, LoRAExperts, MoeRewriteError, TokenRouter
from tests.helpers import architectures
from tests.helpers.reference import randomize
from tests.helpers.sweeps import some

LENGTHS = (5, 1, 12, 3)
NEW = 7


def prompts(lengths=LENGTHS):
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(3, 97, (n,), generator=draw).tolist() for n in lengths]


def pages(**options):
    """Few tokens a call, so that long prompts are read in several."""
    return ContinuousBatchingConfig(num_blocks=64, page_size=4, max_batch_tokens=8, **options)


def greedy(**options):
    return GenerationConfig(
        **{"do_sample": False, "max_new_tokens": NEW, "eos_token_id": -1, **options}
    )


def batched(model, given=None, **options):
    made = model.generate_batch(
        prompts() if given is None else given, generation_config=greedy(),
        continuous_batching_config=pages(**options),
    )  # fmt: skip
    for request in made.values():
        assert request.error is None, request.error
    return list(made.values())


def tokens(requests):
    return [request.generated_tokens for request in requests]


def one_by_one(model, given=None):
    """`generate` on each prompt alone."""
    said = []
    for prompt in prompts() if given is None else given:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
            max_new_tokens=NEW, min_new_tokens=NEW, eos_token_id=-1,
        )  # fmt: skip
        said.append(out[0, len(prompt) :].tolist())
    return said


@pytest.fixture(scope="module", params=some(["token", "prefix"], {"prefix"}))
def moe(request):
    router = TokenRouter(granularity=request.param)
    made = moe_rewrite.convert(
        architectures.build("Llama", layers=4), split=2, router=router, num_experts=3
    )
    assert tokens(batched(made)) == tokens(batched(made.to_dense()))  # experts are zero
    randomize(made, size=0.5)
    return made


def test_requests_say_what_each_says_alone(moe):
    want = one_by_one(moe)
    assert want != one_by_one(moe.to_dense())
    assert tokens(batched(moe)) == want
    (again,) = batched(moe, [prompts()[2]])
    assert again.generated_tokens == want[2]
    kept = [g for key, of in moe._graphs._kept.items() if "PagedLayers" in str(key) for g in of]
    assert len(kept) == 1  # for every number of requests, rows and earlier positions


def test_gates_do_not_depend_on_other_requests(moe):
    """The probabilities of what is said, which every gate changes."""
    company = batched(moe, return_logprobs=True)
    (alone,) = batched(moe, [prompts()[0]], return_logprobs=True)
    assert alone.generated_tokens == company[0].generated_tokens
    assert torch.allclose(
        torch.tensor(alone.logprobs), torch.tensor(company[0].logprobs), atol=1e-5
    )


def test_requests_that_join_later(moe):
    given, want = prompts(), one_by_one(moe)
    said = {}
    with moe.continuous_batching_context_manager(
        generation_config=greedy(), continuous_batching_config=pages()
    ) as manager:
        for i, prompt in enumerate(given):
            manager.add_request(prompt, request_id=str(i), max_new_tokens=NEW, streaming=True)
            while str(i) not in said:  # until it has begun; those before go on
                seen = manager.get_result(timeout=60)
                assert seen is not None
                assert seen.error is None, seen.error
                said[seen.request_id] = seen.generated_tokens
        while any(len(of) < NEW for of in said.values()):
            seen = manager.get_result(timeout=60)
            assert seen is not None
            said[seen.request_id] = seen.generated_tokens
    assert [said[str(i)] for i in range(len(given))] == want


def test_pages_that_are_used_again_and_caches_that_are_full(moe):
    """Requests wait, and are begun anew, where the pages do not hold all of them."""
    given = [p + p for p in prompts()] * 2
    config = ContinuousBatchingConfig(num_blocks=12, page_size=4, max_batch_tokens=16)
    made = moe.generate_batch(given, generation_config=greedy(), continuous_batching_config=config)
    assert [r.error for r in made.values()] == [None] * len(given)
    assert tokens(made.values()) == one_by_one(moe, given)


@pytest.mark.sweep
def test_generate_asks_for_pages_too(moe):
    ids = torch.tensor([prompts()[0]])
    config = greedy()
    config.continuous_batching_config = pages()
    paged = moe.generate(ids, cache_implementation="paged", generation_config=config)
    assert paged[0, 0, ids.shape[1] :].tolist() == one_by_one(moe)[0]


def test_requests_share_the_pages_of_equal_beginnings(moe):
    """Where the router reads single tokens; a prefix router's sums are each request's own."""
    given = [prompts()[2] + [7], prompts()[2] + [8, 9]]
    with moe.continuous_batching_context_manager(
        generation_config=greedy(), continuous_batching_config=pages()
    ) as manager:
        said = []
        for prompt in given:
            name = manager.add_request(prompt, max_new_tokens=NEW)
            seen = manager.get_result(request_id=name, timeout=60)
            assert seen is not None
            said.append(seen.generated_tokens)
        shared = manager.batch_processor.cache.use_prefix_sharing
    assert shared == (not moe.router.keeps_state)
    assert said == one_by_one(moe, given)


@pytest.mark.sweep
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Gemma3", "Mistral", "GPT2", "GPTNeoX", "Phi"])
def test_architectures(name, attention):
    model = architectures.build(name, layers=6 if name == "Gemma3" else 3)
    model.set_attn_implementation(attention)
    router = TokenRouter(granularity="prefix")
    made = moe_rewrite.convert(model, split=1, router=router, num_experts=2)
    given = prompts((14, 2, 9))  # beyond windows of 6
    assert tokens(batched(made, given)) == tokens(batched(model, given))
    randomize(made, size=0.5)
    assert tokens(batched(made, given)) == one_by_one(made, given)
    assert made.config._attn_implementation == attention


@pytest.mark.parametrize(
    "options",
    some(
        [
            {"mode": "upcycle", "experts": FFNExperts(num=4)},
            {"mode": "upcycle", "experts": FFNExperts(num=4), "router": TokenRouter(top_k=2)},
            {"experts": LoRAExperts(sites="all"), "split": 1, "verify": False},
        ],
        [],
    ),
    ids=["a router a layer", "one router", "unverified"],
)
def test_kinds_of_experts(options):
    model = architectures.build("Qwen3")
    made = moe_rewrite.convert(model, num_experts=None if "mode" in options else 3, **options)
    assert tokens(batched(made)) == tokens(batched(model))
    randomize(made, size=0.5)
    assert tokens(batched(made)) == one_by_one(made)


@pytest.mark.sweep
def test_another_attention_gets_a_graph_of_its_own(moe):
    want = one_by_one(moe)
    moe.set_attn_implementation("eager")
    assert tokens(batched(moe)) == want
    assert moe.config._attn_implementation == "eager"
    moe.set_attn_implementation("sdpa")
    assert tokens(batched(moe)) == want
    assert moe.to_dense().config._attn_implementation == "sdpa"


@pytest.mark.sweep
def test_compiled_blocks(moe):
    want = one_by_one(moe)
    compiled = copy.deepcopy(moe)
    compiled.compile(backend="aot_eager")
    assert tokens(batched(compiled)) == want


def test_what_cannot_be_batched_is_refused_before_it_starts(moe):
    def refused(match, model=moe, config=None, **options):
        with pytest.raises(MoeRewriteError, match=match):
            model.generate_batch(
                prompts(), generation_config=greedy(**options),
                continuous_batching_config=config,
            )  # fmt: skip

    refused("use_cuda_graph.*moe.compile", config=pages(use_cuda_graph=True))
    refused("default_compile_level", config=pages(default_compile_level=1))
    with moe.disable_experts():
        refused("thread of its own.*deactivate")
    moe.config._attn_implementation = "flex_attention"
    refused("'flex_attention'.*'sdpa'")
    moe.config._attn_implementation = "sdpa"
    if moe.router.keeps_state:
        refused(
            "num_return_sequences=2.*granularity=.token.", num_return_sequences=2, do_sample=True
        )
        refused("cpu_offload_space=1", config=pages(cpu_offload_space=1.0))
