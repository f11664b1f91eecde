"""Saving and loading: atomic, and only onto the model that was converted."""

import copy
import json
import os
import pickle
import threading

import architectures
import networks
import pytest
import torch
from reference import added, randomize

import moe_rewrite
from moe_rewrite import LoRAExperts, MoeRewriteError
from moe_rewrite.converted.saving import checkpoint
from moe_rewrite.errors import CheckpointError


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
    assert [f.suffix for f in files] == [".md", ".safetensors", ".json"]
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
    assert finished == (step >= 3)  # three files, each written and renamed once; the card is last
    assert same(moe_rewrite.load(saved, model, verify=False), later if step >= 2 else moe)
    assert not [f for f in saved.iterdir() if f.name.startswith(".")]


def edit(folder, **changes):
    """Without the hash of the JSON itself, as in saves of older versions."""
    path = folder / checkpoint.META
    facts = json.loads(path.read_text()) | changes
    facts.pop("meta_sha256")
    path.write_text(json.dumps(facts))


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


@pytest.mark.parametrize("old, new", [
    ('"alpha": 16', '"alpha": 5'), ('"granularity": "prefix"', '"granularity": "token"'),
    ('"normalize": true', '"normalize": false'), ('"base": true', '"base": false'),
    ('"top_k": null', '"top_k": 1'), ('"late"', '"later"'),
])  # fmt: skip
def test_an_edited_json_is_refused(model, saved, old, new):
    path = saved / checkpoint.META
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(CheckpointError, match="changed since it was saved"):
        moe_rewrite.load(saved, model)


def test_an_emptied_hash_is_refused_and_a_save_of_before_it_is_read(model, moe, saved):
    path = saved / checkpoint.META
    path.write_text(json.dumps(json.loads(path.read_text()) | {"meta_sha256": None}))
    with pytest.raises(CheckpointError, match="changed since it was saved"):
        moe_rewrite.load(saved, model)
    edit(saved)
    assert same(moe_rewrite.load(saved, model, verify=False), moe)


@pytest.mark.parametrize(("content", "words"), [
    (b"[" * 100_000, "cannot be read as JSON"), (b"", "cannot be read as JSON"),
    (None, "is no plain file"),
])  # fmt: skip
@pytest.mark.parametrize("which", [checkpoint.META, "*.safetensors"])
def test_an_odd_file_is_refused_in_bounded_time(model, saved, which, content, words):
    """None: a pipe that nobody writes to."""
    path = next(saved.glob(which))
    path.unlink()
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content)
        words = words if path.name == checkpoint.META else "truncated or changed"
    with pytest.raises(CheckpointError, match=words):
        moe_rewrite.load(saved, model)


def test_a_save_that_diverged_is_refused(model, tmp_path):
    moe = moe_rewrite.convert(model, split=1, verify=False)
    with torch.no_grad():
        moe.expert_sites()[0].b[0].fill_(float("nan"))
    moe.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds NaN or infinity: the training .* diverged"):
        moe_rewrite.load(tmp_path, model)


class Peak(torch.nn.Module):
    """Keeps the largest value that it saw; minus infinity where it saw none."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(3)])
        self.register_buffer("peak", torch.full((2,), float("-inf")))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        self.peak[0] = x.detach().max()
        return x


def test_a_buffer_may_hold_infinities_from_the_start(tmp_path):
    dense, x = Peak().eval(), torch.ones(2, 4)
    moe = moe_rewrite.convert(dense, split=1, example_inputs=x)
    moe(x)
    moe.save_pretrained(tmp_path)
    peak = moe_rewrite.load(tmp_path, dense, x).state_dict()["peak"]
    assert torch.equal(peak, moe.state_dict()["peak"]) and peak.isinf().tolist() == [False, True]


FACTS = {"recipe": {}, "expansions": [0], "classes": []}


def write_numbered(folder, number):
    checkpoint.write(folder, {"x": torch.tensor([number])}, FACTS | {"names": [number]}, {})


def read_number(folder):
    meta, tensors = checkpoint.read(folder)
    assert meta["names"] == tensors["x"].tolist()
    return meta["names"][0]


@pytest.mark.parametrize("step", ["_read_meta", "read_bytes"])
def test_a_reader_that_comes_between_two_saves_reads_the_new_one(tmp_path, monkeypatch, step):
    """The JSON that it read first names a file that is deleted before or after it looks."""
    write_numbered(tmp_path, 1)
    first = getattr(checkpoint, step)

    def slow(path):
        monkeypatch.undo()
        read = first(path) if step == "_read_meta" else None
        write_numbered(tmp_path, 2)
        return read or first(path)

    monkeypatch.setattr(checkpoint, step, slow)
    assert read_number(tmp_path) == 2


def test_two_writers_at_once_lose_neither_save(tmp_path, monkeypatch):
    """The second begins while the first has written its tensors, but not yet its JSON."""
    real, others = checkpoint.replace_file, []

    def interrupted(path, content):
        if path.name == checkpoint.META and not others:
            others.append(threading.Thread(target=write_numbered, args=(tmp_path, 2)))
            others[0].start()
            others[0].join(0.2)
        real(path, content)

    monkeypatch.setattr(checkpoint, "replace_file", interrupted)
    write_numbered(tmp_path, 1)
    others[0].join()
    assert read_number(tmp_path) == 2 and len(list(tmp_path.iterdir())) == 2


def test_pickling_is_refused_and_copying_is_not(moe, tmp_path):
    with pytest.raises(CheckpointError, match=r"save_pretrained\(folder\).*moe_rewrite.load"):
        torch.save(moe, tmp_path / "moe.pt")
    with pytest.raises(CheckpointError, match="cannot be pickled"):
        pickle.dumps(torch.nn.Sequential(moe))
    ids = torch.ones(2, 5, dtype=torch.long)
    other = copy.deepcopy(moe)
    assert torch.equal(other(ids).logits, moe(ids).logits) and copy.copy(moe).names == moe.names
    with torch.no_grad():
        other.router.rows[0].add_(1.0)
    assert not torch.equal(other.router.rows[0], moe.router.rows[0])
    torch.save(moe.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert other.load_state_dict(state) and torch.equal(other.router.rows[0], moe.router.rows[0])


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
