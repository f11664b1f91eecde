"""The converted model: training, growing, moving, and the usual interface of a module."""

import copy

import architectures
import networks
import pytest
import torch
from conversions import fresh
from reference import added, copied, hooked, randomize
from torch import nn

import moe_rewrite
from moe_rewrite import LoRAExperts, MoeRewriteError, TokenRouter

TRAINED = TokenRouter(granularity="prefix")


@pytest.fixture(scope="module")
def llama():
    return architectures.build("Llama")


@pytest.fixture
def moe(llama):
    """Two layers deep, one expert that does something, and a router that is trained."""
    moe = fresh(llama, split=1, router=TRAINED)
    randomize(moe)
    return moe


def ids(batch=2, length=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 97, (batch, length), generator=generator)


def logits(model, given=None):
    with torch.no_grad():
        return model(input_ids=ids() if given is None else given, use_cache=False).logits


def train(moe, parameters, steps=3, seed=0):
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    moe.train()
    for _ in range(steps):
        optimizer.zero_grad()
        moe(input_ids=ids(seed=seed), labels=ids(seed=seed)).loss.backward()
        optimizer.step()
    moe.eval()
    return optimizer


# -- growing ----------------------------------------------------------------------------------------


def test_expanding_changes_no_output_also_after_older_experts_are_trained(moe):
    train(moe, moe.trainable_parameters())
    before = logits(moe)
    new = moe.expand(2, name="task")
    assert moe.names == ["expert0", "task.0", "task.1"] and moe.num_experts == 3
    assert torch.equal(logits(moe), before)
    assert len(new) == 2 * (1 + 2 * len(moe.report.sites))
    assert moe.route(input_ids=ids()).gates.shape == (2, 7, 4)
    with torch.no_grad():
        moe.train()
        moe(input_ids=ids())  # the first forward in training turns them on
        moe.eval()
    assert (moe.route(input_ids=ids()).gates > 0).all()
    assert not torch.equal(logits(moe), before)


def test_a_new_expert_is_trained_and_the_others_are_frozen(moe):
    frozen = {n: p.clone() for n, p in moe.named_parameters()}
    new = moe.expand(1)
    rows = list(moe.router.rows)
    assert {id(p) for p in moe.trainable_parameters()} == {id(p) for p in (*new, *rows)}
    train(moe, new)
    for name, p in moe.named_parameters():
        if not any(p is q for q in new):
            assert torch.equal(p, frozen[name]) if name in frozen else not p.requires_grad, name
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in new if p.ndim == 2)


def test_an_optimizer_keeps_its_state_over_an_expansion(moe):
    optimizer = train(moe, moe.trainable_parameters())
    row = moe.router.rows[0]
    moment = optimizer.state[row]["exp_avg"].clone()
    optimizer.add_param_group({"params": moe.expand(1)})
    assert moe.router.rows[0] is row and torch.equal(optimizer.state[row]["exp_avg"], moment)


def test_remove_last_restores_the_router_bitwise(moe):
    moe.expand(1, name="second")
    moe.activate("second")
    randomize(moe, 3)
    before, output = {k: v.clone() for k, v in added(moe).items()}, logits(moe)
    moe.expand(1, name="third")
    train(moe, moe.trainable_parameters())
    moe.deactivate("expert0")
    assert not torch.equal(logits(moe), output)
    moe.remove_last()
    after = added(moe)
    assert after.keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in after.items())
    assert torch.equal(logits(moe), output)
    trained = {n for n, p in after.items() if p.requires_grad and ".experts." in n}
    assert trained and all(n.endswith(".1") for n in trained)  # the second is the newest again
    moe.remove_last()
    with pytest.raises(MoeRewriteError, match="only expert"):
        moe.remove_last()


def test_deactivated_experts_take_no_part(moe):
    dense = logits(moe.to_dense())
    moe.deactivate(0)
    assert torch.equal(logits(moe), dense)
    moe.activate("expert0")
    assert not torch.equal(logits(moe), dense)


def test_without_base_the_gates_are_the_experts_alone(llama):
    router = TokenRouter(granularity="token", base=False, top_k=1, gate="all", init=0.5)
    moe = moe_rewrite.convert(llama, split=1, router=router, num_experts=3)
    randomize(moe)
    gates = moe.route(input_ids=ids()).gates
    assert gates.shape == (2, 7, 3)
    assert torch.equal((gates > 0).sum(-1), torch.ones(2, 7, dtype=torch.long))
    for name in moe.names[:2]:
        moe.deactivate(name)
    with pytest.raises(MoeRewriteError, match="last one that is on"):
        moe.deactivate(moe.names[2])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.expand(0), "n=0"),
        (lambda m: m.expand(True), "n=True"),
        (lambda m: m.expand(1, name=""), "name=''"),
        (lambda m: m.expand(1, name="expert0"), "an expert has this name already"),
        (lambda m: m.activate("nobody"), "'nobody'"),
        (lambda m: m.deactivate(7), "7"),
        (lambda m: m(input_ids=ids(), nonsense=1), "takes no argument nonsense"),
        (lambda m: m(), "pass input_ids"),
        (lambda m: m(input_ids=ids(2), attention_mask=torch.ones(3, 7)), "attention_mask"),
        (lambda m: m(input_ids=ids(), past_key_values=((1,),)), "DynamicCache"),
    ],
)
def test_wrong_calls_name_the_value(moe, call, words):
    before = {k: v.clone() for k, v in moe.state_dict().items()}
    with pytest.raises(MoeRewriteError, match=words):
        call(moe)
    assert {k: torch.equal(v, before[k]) for k, v in moe.state_dict().items()} == dict.fromkeys(
        before, True
    )


# -- training --------------------------------------------------------------------------------------


def test_the_shallow_segment_builds_no_autograd_graph(moe):
    moe.train()
    assert not any(m.training for m in moe.shallow.modules())
    embeddings = moe.to_dense().get_input_embeddings()(ids()).detach().requires_grad_()
    loss = moe(inputs_embeds=embeddings, labels=ids()).loss
    loss.backward()
    assert embeddings.grad is None
    assert all(p.grad is None for p in moe.shallow.parameters())
    assert {n for n, p in moe.named_parameters() if p.grad is not None} == {
        n for n, p in moe.named_parameters() if p.requires_grad
    }


# -- a module among modules ------------------------------------------------------------------------


def test_the_original_is_never_changed():
    model = architectures.build("GPT2").train()
    model.transformer.h[0].eval()
    next(model.parameters()).requires_grad_(False)
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    before = copy.deepcopy(model.state_dict())
    moe = moe_rewrite.convert(model, split=1, router="token")
    assert moe.training  # as the model it came from
    randomize(moe)
    moe.expand(1)
    train(moe, moe.trainable_parameters())
    moe.to(torch.bfloat16)
    logits(moe)
    moe_rewrite.verify(model, moe_rewrite.convert(model, split=2), {"input_ids": ids()})
    assert modes == [m.training for m in model.modules()]
    assert flags == [p.requires_grad for p in model.parameters()]
    assert model.dtype == torch.float32 and moe.to_dense() is model
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_storage_is_shared_and_tied_weights_have_one_owner():
    model = architectures.build("GPT2")  # embedding and head are one tensor, across the cut
    moe = moe_rewrite.convert(model, split=1, verify=False)
    state = moe.state_dict()
    for name, tensor in model.state_dict().items():
        assert state[name].data_ptr() == tensor.data_ptr(), name
    extra = {k for k in state if k not in model.state_dict()}
    assert extra and all(k.startswith("moe_rewrite.") for k in extra)
    dense = {p.data_ptr() for p in model.parameters()}
    owned = [p.data_ptr() for p in moe.parameters() if p.data_ptr() in dense]
    assert len(owned) == len(set(owned)) == len(dense)
    assert not {id(p) for p in moe.parameters()} & {id(p) for p in model.parameters()}


def test_state_dict_round_trip(llama, moe):
    other = fresh(llama, split=1, router=TRAINED)
    state = moe.state_dict()
    assert other.load_state_dict(state, strict=True).missing_keys == []
    assert torch.equal(logits(other), logits(moe))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict({**state, "moe_rewrite.nothing": torch.zeros(1)})
    wrapped = nn.ModuleDict({"inner": moe})
    assert set(wrapped.state_dict()) == {f"inner.{k}" for k in state}


@pytest.mark.sweep
def test_cast_equals_conversion_of_the_cast_model(llama, moe):
    dense = copy.deepcopy(llama).to(torch.bfloat16)
    half = moe_rewrite.convert(dense, split=1, router=TRAINED, verify=False)
    with torch.no_grad():
        for name, p in added(half).items():
            p.copy_(added(moe)[name])
    moe.to(torch.bfloat16)
    assert moe.dtype == torch.bfloat16 and moe.router.rows[0].dtype == torch.float32
    assert torch.equal(logits(moe), logits(half))
    generate = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(moe.generate(ids(), **generate), half.generate(ids(), **generate))


def test_a_move_to_another_device_captures_anew(llama, moe):
    """To the meta device, the one other device that every machine has."""
    moe.to("meta")
    given = torch.zeros(2, 7, dtype=torch.long, device="meta")
    assert logits(moe, given).device.type == "meta"
    assert {p.device.type for p in moe.parameters()} == {"meta"}
    assert {p.device.type for p in llama.parameters()} == {"cpu"}


def test_deep_copies_are_independent(moe):
    before = logits(moe)
    other = copy.deepcopy(moe)
    assert torch.equal(logits(other), before)
    randomize(other, 9)
    other.expand(1)
    assert torch.equal(logits(moe), before) and moe.num_experts == 1
    assert not torch.equal(logits(other), before)


def test_parts_and_habits(moe, capsys):
    assert [b.name for b in moe.shallow] == ["stem", "model.layers.0"]
    assert [b.name for b in moe.deep] == ["model.layers.1", "model.layers.2", "head"]
    assert moe.config is moe.host.config and moe.device.type == "cpu"
    moe.print_trainable_parameters()
    trainable = sum(p.numel() for p in moe.trainable_parameters())
    assert f"trainable params: {trainable:,}" in capsys.readouterr().out
    assert "model.layers.1.mlp.up_proj" in str(moe.report)


@pytest.mark.parametrize(
    "extra",
    [
        {"labels": ids()},
        {"output_hidden_states": True},
        {"output_attentions": False},
        {"return_dict": False, "use_cache": False},
        {"logits_to_keep": 2},
        {"position_ids": torch.arange(4, 11).expand(2, 7)},
        {"attention_mask": torch.ones(2, 7, dtype=torch.long)},
        {"use_cache": True},
    ],
)
def test_every_argument_is_honoured(llama, moe, extra):
    """Routed too: the result is that of hooks on the original, for every argument."""
    given = {"input_ids": ids()} | extra
    with torch.no_grad(), hooked(llama, "model.layers.0", copied(moe), 2.0, "prefix"):
        want = llama(**given)
    with torch.no_grad():
        got = moe(**given)
    assert type(want) is type(got)
    pairs = zip(want, got, strict=True) if isinstance(want, tuple) else (
        (want[k], got[k]) for k in want
    )  # fmt: skip
    for a, b in pairs:
        for x, y in zip(*((v if isinstance(v, tuple) else (v,)) for v in (a, b)), strict=True):
            if isinstance(x, torch.Tensor):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_plain_modules_take_positional_and_keyword_arguments():
    model = networks.Network(["Mlp", "Attention", "Mlp"], head="pooled").eval()
    moe = moe_rewrite.convert(model, split=1, experts=LoRAExperts(sites=["up"]))
    x = model.input(3, 5)
    with torch.no_grad():
        for got in (moe(x), moe(x=x)):
            want = model(x)
            assert got.keys() == want.keys() and torch.equal(got["logits"], want["logits"])
    with pytest.raises(MoeRewriteError, match="multiple values|unexpected"):
        moe(x, x=x)
    with pytest.raises(MoeRewriteError, match="generate"):
        moe.generate(x)


def test_experts_can_be_disabled_for_a_while(llama, moe):
    """As PEFT's disable_adapter: the dense model, bit for bit, cached generation too."""
    assert not torch.equal(logits(moe), logits(llama))
    kwargs = {"input_ids": ids(), "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with moe.disable_experts():
        assert torch.equal(logits(moe), logits(llama))
        assert torch.equal(moe.generate(**kwargs), llama.generate(**kwargs))
    assert not torch.equal(logits(moe), logits(llama))
