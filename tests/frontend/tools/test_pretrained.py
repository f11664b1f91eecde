"""What tools read off a converted model is the original's."""

import copy
import inspect
from types import MethodType

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)

pytest.importorskip("transformers")
from small_text import llama
from transformers import PreTrainedModel

import moe_rewrite
from moe_rewrite import MoEModel, MoeRewriteError


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def pair(request):
    dense = llama(tie_word_embeddings=request.param)
    return dense, moe_rewrite.convert(dense, split=1, verify=False)


def test_the_class_has_the_originals_name_signature_and_values(pair):
    dense, moe = pair
    assert isinstance(moe, (MoEModel, PreTrainedModel)) and isinstance(moe, MoEModel)
    assert type(moe).__name__ == "LlamaForCausalLM" and "MoEModel" in repr(type(moe))
    assert inspect.signature(moe.forward) == inspect.signature(dense.forward)
    assert inspect.signature(type(moe).forward) == inspect.signature(type(dense).forward)
    assert moe.forward.__annotations__ == dense.forward.__annotations__
    for name in ("_no_split_modules", "main_input_name", "base_model_prefix", "config_class"):
        assert getattr(moe, name) == getattr(dense, name), name
    assert moe.config.to_dict() == dense.config.to_dict()
    assert moe.vocab_size == dense.vocab_size and moe.can_generate()
    assert moe.name_or_path == dense.name_or_path


def test_parts_are_those_of_the_original_over_its_tensors(pair):
    dense, moe = pair
    for name in ("get_input_embeddings", "get_output_embeddings"):
        mine, theirs = getattr(moe, name)(), getattr(dense, name)()
        assert type(mine) is type(theirs) and mine.weight.data_ptr() == theirs.weight.data_ptr()
    ids = torch.arange(6).view(2, 3)
    mine, theirs = (
        m.prepare_inputs_for_generation(ids, is_first_iteration=True) for m in (moe, dense)
    )
    assert mine.keys() == theirs.keys()
    assert not hasattr(moe, "anything_else") and not hasattr(moe, "get_image_features")


def test_generate_follows_what_is_set_in_generation_config(pair):
    moe = copy.deepcopy(pair[1])
    ids = torch.ones(1, 3, dtype=torch.long)
    moe.generation_config.max_new_tokens = 2
    assert moe.generate(ids, eos_token_id=None).shape == (1, 5)
    assert pair[1].generation_config.max_new_tokens is None
    moe.generation_config = type(moe.generation_config)(max_new_tokens=4)
    assert moe.generate(ids, eos_token_id=None).shape == (1, 7)


@pytest.mark.parametrize("call", [
    lambda moe: moe.resize_token_embeddings(70),
    lambda moe: moe.set_input_embeddings(nn.Embedding(2, 2)),
    lambda moe: moe.add_adapter(None),
    lambda moe: type(moe).from_pretrained("folder"),
    lambda moe: moe.gradient_checkpointing_enable(offload=True),
    lambda moe: moe.save_pretrained("folder", no_such_option=1),
])  # fmt: skip
def test_what_cannot_work_says_what_to_do(pair, call):
    with pytest.raises(MoeRewriteError, match="convert|expand|leave|save_only_added"):
        call(pair[1])


def test_names_agree_and_are_paths_of_modules(pair):
    dense, moe = pair
    state = moe.state_dict()
    frozen = {n for n, _ in moe.named_parameters() if not n.startswith("moe_rewrite.")}
    assert frozen == {n for n, _ in dense.named_parameters()}
    every = {n for n, _ in moe.named_parameters(remove_duplicate=False)}
    assert every | {n for n, _ in moe.named_buffers()} | {"moe_rewrite._extra_state"} >= set(state)
    assert list(dense.state_dict()) == [n for n in state if not n.startswith("moe_rewrite.")]
    for name, p in moe.named_parameters():
        assert moe.get_parameter(name) is p
    tied = dense.config.tie_word_embeddings
    assert (moe.lm_head.weight is moe.model.embed_tokens.weight) == tied
    moe_d = moe.to(torch.float64)
    assert (moe_d.lm_head.weight is moe_d.model.embed_tokens.weight) == tied
    moe.to(torch.float32)


def test_distributed_state_dicts_are_read_and_set(pair):
    _, moe = pair
    whole = get_model_state_dict(moe)
    assert set(whole) == set(moe.state_dict())
    trained = get_model_state_dict(moe, options=StateDictOptions(ignore_frozen_params=True))
    assert not [n for n in trained if n.startswith("model.")]
    changed = {k: t + 1 if t.is_floating_point() else t for k, t in trained.items()}
    set_model_state_dict(moe, changed, options=StateDictOptions(strict=False))
    sites = [n for n in trained if ".experts." in n]
    assert sites and "moe_rewrite.router.rows.0" not in trained  # solved, not trained
    now = moe.state_dict()
    assert all(torch.equal(now[n], changed[n]) for n in sites)


class Own(nn.Module):
    """A module of one's own, with a name that a converted model uses too, and values."""

    accepts_loss_kwargs = False

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
        self.router, self.scale = nn.Linear(8, 3), nn.Parameter(torch.ones(8))
        self.num_classes = 3

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict:
        """Own words."""
        for layer in self.features:
            x = x + layer(x).tanh()
        logits = self.router(x * self.scale)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_own_modules_keep_what_they_are():
    torch.manual_seed(0)
    dense, x = Own().eval(), torch.randn(3, 8)
    moe = moe_rewrite.convert(dense, split=2, example_inputs=x)
    assert type(moe).__name__ == "Own" and not isinstance(moe, PreTrainedModel)
    assert inspect.signature(moe.forward) == inspect.signature(dense.forward)
    assert moe.forward.__doc__ == "Own words." and moe.accepts_loss_kwargs is False
    assert moe.num_classes == 3 and not hasattr(moe, "num_labels")
    assert [n for n, _ in moe.named_parameters()][:1] == ["scale"]
    assert set(get_model_state_dict(moe)) == set(moe.state_dict())
    assert moe.get_submodule("features.0").weight.shape == (8, 8)
    other = moe_rewrite.convert(Own().eval(), split=2, example_inputs=x)
    set_model_state_dict(other, get_model_state_dict(moe))
    assert torch.equal(other(x)["logits"], dense(x)["logits"])


def test_a_forward_set_on_the_object_is_shown():
    def logits(self, x):
        return Own.forward(self, x)["logits"]

    own, example = Own().eval(), torch.randn(3, 8)
    own.forward = MethodType(logits, own)
    models = own, Own().eval()
    for model, names in zip(models, (["x"], ["x", "labels"]), strict=True):
        moe = moe_rewrite.convert(model, split=2, example_inputs=example, verify=False)
        assert list(inspect.signature(moe.forward).parameters) == names
        assert list(inspect.signature(type(moe).forward).parameters) == ["self", *names]
