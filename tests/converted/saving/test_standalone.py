"""Folders with a modelling file of their own: written, and read where this package is not."""

import copy
import json
import os
import pickle
import threading
from contextlib import ExitStack

import pytest
import torch
from architectures import build, build_other
from standalone import IDS, calls, filled, opened, read_elsewhere, trained
from sweeps import some

import moe_rewrite
from moe_rewrite import LoRAExperts, TokenRouter
from moe_rewrite.errors import ConfigError, ConversionError, EquivalenceError

PREFIX = TokenRouter(granularity="prefix", top_k=2, init=0.5)
TOKEN = TokenRouter(top_k=2, gate="all", init=0.5, normalize=False)
CAUSAL = "AutoModelForCausalLM"
FEW = {
    ("Llama", PREFIX): CAUSAL,
    ("Bert", "auto"): "AutoModelForMaskedLM",
    ("ViT", "auto"): "AutoModel",
}
REST = {
    **{(n, "auto"): CAUSAL for n in ("GPTNeoX", "Qwen3", "Gemma3", "Mistral", "Phi", "OPT", "Bloom", "Falcon")},
    **{(n, "auto"): "AutoModelForMaskedLM" for n in ("Roberta", "DistilBert", "DebertaV2", "ModernBert")},
    ("GPT2", TOKEN): CAUSAL, ("Dinov2", "auto"): "AutoModel",
    ("Llama", TokenRouter(granularity="prefix", fit="analytic", projection=64)): CAUSAL,
    ("Dinov2", TOKEN): "AutoModel", ("Mistral", TOKEN): CAUSAL,
    ("Llama", TokenRouter(base=False, init=0.5)): CAUSAL,
    ("Llama", TokenRouter(fit="analytic", projection=64, top_k=1)): CAUSAL,
    ("Llama", TokenRouter(granularity="prefix", fit="analytic", projection=64, base=False)): CAUSAL,
    ("Bert", TokenRouter(granularity="sequence", fit="analytic", projection=64)): "AutoModelForMaskedLM",
}  # fmt: skip


def generations(model):
    """Greedy, beams, and more than one prompt padded on the left, all with caches."""
    if not hasattr(model, "generate") or not model.can_generate():
        return []
    mask = torch.ones(2, 12).long()
    mask[1, :3] = 0
    usual = {
        "max_new_tokens": 6,
        "do_sample": False,
        "input_ids": IDS[:, :12],
        "attention_mask": mask,
    }
    return [usual, usual | {"num_beams": 3}]


def compared(moe, made):
    """(the largest difference of a written model's outputs, whether they are the dense model's)."""
    worst, dense = 0.0, 0.0
    for given, theirs in zip(calls(moe.to_dense()), made, strict=False):
        keep = given["attention_mask"] != 0 if "attention_mask" in given else slice(None)
        with torch.no_grad():
            ours, was = moe(**given), moe.to_dense()(**given)
        (key, *_), said = theirs, (ours, was)
        mine, before = (getattr(out, key)[keep] for out in said)
        scale = max(1.0, float(mine.abs().max()))
        worst = max(worst, float((mine - theirs[key][keep]).abs().max()) / scale)
        dense = max(dense, float((mine - before).abs().max()))
    assert dense > 0.01, "the experts add nothing: this would compare dense models"
    return worst


@pytest.mark.parametrize("cases, made_by", [
    pytest.param(FEW, filled, id="few"),
    pytest.param(FEW | REST, trained, marks=pytest.mark.sweep, id="all, trained"),
])  # fmt: skip
def test_folders_are_read_without_this_package(cases, made_by, tmp_path):
    folders = {tmp_path / f"model{i}": auto for i, auto in enumerate(cases.values())}
    for (name, router), folder in zip(cases, folders, strict=True):
        moe = made_by(name, router)
        moe.save_pretrained(folder, standalone=True)
        given = {"calls": calls(moe.to_dense()), "generate": generations(moe)}
        torch.save(given, folder / "calls.pt")
    for (name, router), made in zip(cases, read_elsewhere(folders), strict=True):
        moe = made_by(name, router)
        assert compared(moe, made) < 1e-5, name
        for given, ids in zip(generations(moe), made[len(calls(moe.to_dense())) :], strict=True):
            assert torch.equal(ids, moe.generate(**given)), name


def test_experts_that_are_off_are_left_out_and_the_folder_says_which_are_in(tmp_path):
    moe = copy.deepcopy(filled("Llama", TOKEN))
    moe.expand(1, name="late")
    moe.deactivate("expert0")
    moe.save_pretrained(tmp_path / "it", standalone=True)
    facts = json.loads((tmp_path / "it" / "config.json").read_text())["moe_rewrite"]
    assert facts["experts"] == ["expert1"]
    with ExitStack() as stack, torch.no_grad():
        model = opened(stack, tmp_path / "it")
        ours, theirs = (m(IDS[:, :9]).logits for m in (moe, model))
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def test_copies_threads_and_compiled_models_compute_the_same(tmp_path):
    moe = filled("Llama", TOKEN)
    moe.save_pretrained(tmp_path / "it", standalone=True)
    with ExitStack() as stack, torch.no_grad():
        model = opened(stack, tmp_path / "it")
        want = [model(IDS[:, :n]).logits for n in range(1, 7)]
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(IDS[:, :6], use_cache=False).logits, want[-1])
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            first = next(m for m in model.modules() if hasattr(m, "plan"))
            assert all(m.plan is not first.plan for m in copied.modules() if hasattr(m, "plan"))
            assert torch.equal(copied(IDS[:, :5]).logits, want[4])
        wrong = []

        def work(n):
            for _ in range(10):
                with torch.no_grad():
                    if not torch.equal(model(IDS[:, :n]).logits, want[n - 1]):
                        wrong.append(n)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 7)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert not wrong


def test_half_precision_keeps_the_gate_in_float32(tmp_path):
    moe = moe_rewrite.convert(build("Llama").to(torch.bfloat16), split=1, router=TOKEN)
    moe.save_pretrained(tmp_path / "it", standalone=True)
    with ExitStack() as stack:
        model = opened(stack, tmp_path / "it")
        found = {n: p.dtype for n, p in model.named_parameters()}
        assert found["model.gate_of_experts.weight"] == torch.float32
        assert found["model.layers.1.mlp.up_proj.low_rank.up.weight"] == torch.bfloat16
        with torch.no_grad():
            ours, theirs = (m(IDS[:, :9]).logits for m in (moe, model))
        torch.testing.assert_close(theirs, ours, rtol=0.05, atol=0.05)


def test_calls_that_a_gate_over_the_prefix_cannot_serve_are_errors(tmp_path):
    filled("Llama", PREFIX).save_pretrained(tmp_path / "it", standalone=True)
    with ExitStack() as stack, torch.no_grad():
        model = opened(stack, tmp_path / "it")
        ids = IDS[:, :6]
        with pytest.raises(ValueError, match="several documents"):
            model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]] * 2), use_cache=False)
        with pytest.raises(ValueError, match="attention_mask of shape"):
            model(ids, attention_mask=torch.zeros(2, 1, 6, 6))
        with pytest.raises(ValueError, match="StaticCache"):
            model.generate(ids, cache_implementation="static", max_new_tokens=2)
        made = model(ids, use_cache=True)
        (name,) = {"past_key_values", "cache"}.intersection(made.keys())
        made[name].layers.pop()
        with pytest.raises(ValueError, match="filled without the gate"):
            model(ids[:, :1], **{name: made[name]})
        assert model(ids).logits.shape == (2, 6, 97)


REFUSED = {
    "patch": (lambda: moe_rewrite.convert(build("ViT"), split=1, router="patch"), "a PatchRouter"),
    "upcycle": (lambda: moe_rewrite.convert(build("Llama"), mode="upcycle", num_experts=2), "save_standard"),
    "choice": (
        lambda: moe_rewrite.convert(build("ViT"), split=1, router=TokenRouter(policy="expert", base=False)),
        "policy='expert'",
    ),
    "head": (
        lambda: moe_rewrite.convert(build("Llama"), split=1, experts=LoRAExperts(sites="all+head")),
        "lm_head is the output head",
    ),
    "two stacks": (lambda: moe_rewrite.convert(build_other("T5"), split="decoder.block.1"), "encoder-decoder"),
    "shared layers": (lambda: moe_rewrite.convert(build_other("Albert"), split=1), "runs 4 times"),
    "own experts": (lambda: moe_rewrite.convert(build_other("Qwen3Moe"), split=1), "mlp.gate is no linear map"),
    "plain": (
        lambda: moe_rewrite.convert(
            torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4))), split=1, router="token"
        ),
        "Sequential is no model of transformers",
    ),
    "off": (lambda: off(), "every expert is off"),
}  # fmt: skip


def off():
    moe = moe_rewrite.convert(build("Llama"), split=1)
    moe.deactivate(0)
    return moe


@pytest.mark.parametrize("case", some(REFUSED, ["patch", "head", "plain", "off"]))
def test_what_cannot_be_held_is_refused_by_name_and_nothing_is_written(case, tmp_path):
    make, said = REFUSED[case]
    with pytest.raises((ConversionError, ConfigError)) as error:
        make().save_pretrained(tmp_path / "it", standalone=True)
    assert "standalone=True" in str(error.value) and said in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_file_that_computes_something_else_is_found_and_the_folder_stays(tmp_path, monkeypatch):
    from moe_rewrite.converted.saving import standalone

    moe, folder = filled("Llama", TOKEN), tmp_path / "it"
    moe.save_pretrained(folder, standalone=True, max_shard_size=40_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    rows = standalone.gate_tensors
    monkeypatch.setattr(standalone, "gate_tensors", lambda *a: {k: -t for k, t in rows(*a).items()})
    with pytest.raises(EquivalenceError, match="differs by .*: nothing was written"):
        moe.save_pretrained(folder, standalone=True)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert os.listdir(tmp_path) == ["it"]
    monkeypatch.undo()
    moe.save_pretrained(folder, standalone=True)
    assert sorted(p.name for p in folder.glob("model*.safetensors")) == ["model.safetensors"]
