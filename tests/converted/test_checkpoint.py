"""Saving and loading: atomic, and only onto the model that was converted."""

import copy
import json
import os

import architectures
import networks
import pytest
import torch
from reference import added, randomize

import moe_rewrite
from moe_rewrite import LoRAExperts, MoeRewriteError
from moe_rewrite.converted import checkpoint


@pytest.fixture(scope="module")
def model():
    return architectures.build("Llama")


@pytest.fixture(scope="module")
def moe(model):
    experts = LoRAExperts(rank=4, sites=["up_proj", "q_proj"])
    moe = moe_rewrite.convert(model, split=1, num_experts=2, experts=experts, verify=False)
    moe.expand(1, name="late")
    randomize(moe)
    return moe


@pytest.fixture
def saved(moe, tmp_path):
    moe.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def same(a, b):
    x, y = added(a), added(b)
    return x.keys() == y.keys() and all(torch.equal(v, y[k]) for k, v in x.items())


def test_what_was_added_comes_back(model, moe, saved):
    back = moe_rewrite.load(saved, model)
    assert same(moe, back) and back.names == ["expert0", "expert1", "late"]
    trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (moe, back)]
    assert trained[0] == trained[1]
    ids = torch.randint(3, 97, (2, 5))
    for _ in ("off", "on"):
        with torch.no_grad():
            assert torch.equal(moe(input_ids=ids).logits, back(input_ids=ids).logits)
        moe.activate("late"), back.activate("late")
    moe.deactivate("late"), back.remove_last()
    assert back.names == ["expert0", "expert1"]


def test_only_what_was_added_is_written(model, moe, saved):
    files = sorted(saved.iterdir())
    assert [f.suffix for f in files] == [".safetensors", ".json"]
    dense = sum(p.numel() * 4 for p in model.parameters())
    assert sum(f.stat().st_size for f in files) < dense
    moe.save_pretrained(saved)
    assert sorted(saved.iterdir()) == files


@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_crash_leaves_the_previous_save_whole(model, moe, saved, monkeypatch, call, step):
    """Stopped at any write or rename of a second save, the folder holds one of the two."""
    later = copy.deepcopy(moe)
    randomize(later, 7)
    real, calls = getattr(os, call), []

    def crash(*args):
        calls.append(args)
        if len(calls) > step:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(os, call, crash)
    try:
        later.save_pretrained(saved)
        finished = True
    except KeyboardInterrupt:
        finished = False
    monkeypatch.undo()
    assert finished == (step >= 2)  # two files, each written and renamed once
    assert same(moe_rewrite.load(saved, model, verify=False), later if finished else moe)
    assert not [f for f in saved.iterdir() if f.name.startswith(".")]


def edit(folder, **changes):
    path = folder / checkpoint.META
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def damage(folder, how):
    tensors = next(folder.glob("*.safetensors"))
    content = tensors.read_bytes()
    facts = json.loads((folder / checkpoint.META).read_text())
    if how == "truncated":
        tensors.write_bytes(content[:-3])
    elif how == "flipped":
        tensors.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif how == "gone":
        tensors.unlink()
    elif how == "no json":
        (folder / checkpoint.META).unlink()
    elif how == "bad json":
        (folder / checkpoint.META).write_text("{")
    elif how == "list":
        (folder / checkpoint.META).write_text("[]")
    elif how == "version":
        edit(folder, format=99)
    elif how == "path":
        edit(folder, sha256="../../../etc/passwd")
    elif how == "recipe":
        edit(folder, recipe=facts["recipe"] | {"experts": {"kind": "LoRAExperts", "rank": "many"}})
    elif how == "unknown option":
        edit(folder, recipe=facts["recipe"] | {"router": {"kind": "TokenRouter", "nonsense": 1}})
    elif how == "names":
        edit(folder, names=["a", "a", "b"])
    elif how == "rank":
        experts = facts["recipe"]["experts"] | {"rank": 2, "sites": ["up_proj", "q_proj"]}
        edit(folder, recipe=facts["recipe"] | {"experts": experts})
    elif how == "kind":
        edit(folder, recipe=facts["recipe"] | {"router": {"kind": "__import__"}})


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("truncated", "truncated or changed"), ("flipped", "truncated or changed"),
        ("gone", "cannot be read"), ("no json", "cannot be read"), ("bad json", "cannot be read"),
        ("list", "format None"), ("version", "format 99.*upgrade"), ("path", "sha256"),
        ("recipe", "recipe is malformed"), ("unknown option", "recipe is malformed"),
        ("kind", "recipe is malformed"),
        ("names", "names of experts"), ("rank", "do not fit"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused(model, saved, how, words):
    before = {k: (v.data_ptr(), v._version) for k, v in model.state_dict().items()}
    damage(saved, how)
    with pytest.raises(MoeRewriteError, match=words):
        moe_rewrite.load(saved, model)
    assert before == {k: (v.data_ptr(), v._version) for k, v in model.state_dict().items()}


def test_a_save_belongs_to_the_model_as_it_was_converted(tmp_path):
    """Whatever became of the original since: cast, another head."""
    torch.manual_seed(0)
    dense = networks.Network(["Mlp", "Mlp"], tokens=False)
    untouched = copy.deepcopy(dense)
    moe = moe_rewrite.convert(dense, split=1, example_inputs=torch.zeros(2, 6, 5))
    dense.half()
    dense.head = torch.nn.Linear(8, 2)
    moe.save_pretrained(tmp_path)
    x = torch.randn(3, 7, 5)
    assert torch.equal(moe_rewrite.load(tmp_path, untouched, x)(x), moe(x))
    with pytest.raises(MoeRewriteError, match="another base model"):
        moe_rewrite.load(tmp_path, dense, x)


def test_another_base_model_is_refused(model, saved):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight[3] += 1e-6  # one element is enough
    with pytest.raises(MoeRewriteError, match=r"another base model \(LlamaForCausalLM\).*norm"):
        moe_rewrite.load(saved, other)
    with pytest.raises(MoeRewriteError, match="another base model"):
        moe_rewrite.load(saved, architectures.build("Qwen3"))
    with pytest.raises(MoeRewriteError, match="cannot be read"):
        moe_rewrite.load(saved / "nowhere", model)
