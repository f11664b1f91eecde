"""Language models whose cache is not keys and values alone: they answer and generate without one."""

import pytest
import torch
import transformers as tf

import moe_rewrite
from moe_rewrite import MoeRewriteError, TokenRouter
from tests.helpers.reference import randomize
from tests.helpers.sweeps import some

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 4, **IDS}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
STATE = {"state_size": 4, "num_heads": 4, "head_dim": 16, "n_groups": 2}
MAMBA = {f"mamba_{k}": v for k, v in {"d_state": 4, "n_heads": 4, "d_head": 16}.items()}
MODELS = {
    "Mamba": {"state_size": 4},
    "Mamba2": STATE,
    "RecurrentGemma": {"num_attention_heads": 4, "intermediate_size": 48, "lru_width": 32},
    "FalconH1": ATTENTION | MAMBA | {"mamba_d_ssm": 64},
    "Qwen3Next": ATTENTION
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    | {"shared_expert_intermediate_size": 16, "head_dim": 16, "linear_num_value_heads": 4}
    | {"linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "MiniMax": ATTENTION | {"num_local_experts": 2, "head_dim": 8},
}
GREEDY = {"do_sample": False, "pad_token_id": 0, "min_new_tokens": 7, "max_new_tokens": 7}


@pytest.fixture(params=some(MODELS, {"Mamba", "FalconH1"}))
def dense(request):
    config = getattr(tf, f"{request.param}Config")(**SIZES | MODELS[request.param])
    torch.manual_seed(0)
    return getattr(tf, f"{request.param}ForCausalLM")(config).eval()


@pytest.mark.parametrize("granularity", ["prefix", "token"])
def test_calls_and_texts_are_those_without_a_cache(dense, granularity):
    router = TokenRouter(granularity=granularity)
    moe = moe_rewrite.convert(dense, split=2, router=router, num_experts=2)
    randomize(moe, size=0.5)
    ids = torch.randint(3, 97, (2, 5))
    given = {"attention_mask": torch.ones_like(ids), **GREEDY}
    with torch.no_grad():
        called = moe(input_ids=ids).logits  # the configuration asks for a cache
        assert torch.equal(called, moe(input_ids=ids, use_cache=False).logits)
        with pytest.warns(UserWarning, match="runs all before it again"):
            said = moe.generate(ids, **given)
        assert torch.equal(said, moe.generate(ids, **given, use_cache=False))
        best = moe(input_ids=said[:, :-1]).logits.argmax(-1)[:, 4:]
        assert torch.equal(best, said[:, 5:])
        with moe.disable_experts():
            said = moe.generate(ids, **given, use_cache=False)
        assert torch.equal(said, dense.generate(ids, **given, use_cache=False))


def test_a_cache_that_is_asked_for_is_refused(dense):
    moe = moe_rewrite.convert(dense, split=2)
    ids = torch.randint(3, 97, (2, 5))
    with torch.no_grad():
        with pytest.raises(MoeRewriteError, match="cache.*pass use_cache=False"):
            moe(input_ids=ids, use_cache=True)
        with pytest.raises(MoeRewriteError, match="cache.*pass use_cache=False"):
            moe.generate(ids, **GREEDY, use_cache=True)
        with pytest.raises(MoeRewriteError, match="cache.*pass use_cache=False"):
            moe.generate(ids, **GREEDY, cache_implementation="static")
    with pytest.raises(MoeRewriteError, match=r"generate_batch\(\) needs one"):
        moe.generate_batch([[5, 6, 7]])
    with pytest.raises(MoeRewriteError, match="cache.*pass use_cache=False"):
        moe_rewrite.onnx.export_onnx(moe, "never.onnx", cache=True)
