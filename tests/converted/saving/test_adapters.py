"""Folders of adapters and a router: PEFT reads the one, AdapterRouter the other."""

import copy
import dataclasses
import json

import pytest
import torch
from architectures import build
from conversions import fresh
from safetensors.torch import load_file, save_file
from standalone import IDS, filled
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moe_rewrite import PatchRouter, TokenRouter
from moe_rewrite.converted.saving import adapters
from moe_rewrite.errors import (
    CheckpointError,
    ConfigError,
    ConversionError,
    EquivalenceError,
    InputError,
)
from moe_rewrite.serve import AdapterRouter

peft = pytest.importorskip("peft")

PREFIX = TokenRouter(granularity="prefix", top_k=2, init=0.5)
KNOWN = TokenRouter(granularity="prefix", fit="analytic", projection=64)
FEW = [("Llama", "auto"), ("GPT2", PREFIX)]
REST = [
    ("Llama", TokenRouter(granularity="prefix", top_k=1, gate="all", init=0.5)),
    ("Llama", TokenRouter(granularity="prefix", base=False, init=0.5, normalize=False)),
    ("Bert", TokenRouter(granularity="sequence", init=0.5)),
    ("Bert", TokenRouter(granularity="sequence", fit="analytic", projection=64)),
    *((name, KNOWN) for name in ("Qwen3", "Gemma3", "OPT", "Phi", "GPTNeoX", "ModernBert")),
]
CASES = [*FEW, *(pytest.param(*case, marks=pytest.mark.sweep) for case in REST)]
FOUR = IDS[:1, :4]


def tokenizer(**options):
    words = {f"w{i}": i for i in range(90)} | {"?": 90}
    made = Tokenizer(models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?", **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a Llama with experts expert0 and expert1, and a tokenizer; not to be changed."""
    place = tmp_path_factory.mktemp("served") / "llama"
    chat = "{% for m in messages %}{{ m['content'] }} {% endfor %}w1"
    filled("Llama").save_adapters(place, tokenizer=tokenizer(chat_template=chat))
    return place


def logits(out):
    return next(v for v in out.values() if v.is_floating_point())


@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:.is_gradient_checkpointing")  # PEFT's
@pytest.mark.parametrize(("name", "router"), CASES)
@torch.no_grad()
def test_peft_and_the_router_compute_what_the_model_computes(name, router, tmp_path):
    moe = filled(name, router)
    moe.save_adapters(tmp_path / "served")
    read, used = AdapterRouter.load(tmp_path / "served"), set()
    for length in (1, 2, 5, 17, 40):
        for row in IDS[:, :length]:
            gates = moe.route(input_ids=row[None]).gates[0, -1]
            weights = read.weights(row.tolist())
            torch.testing.assert_close(torch.tensor([*weights.values()]), gates, rtol=0, atol=1e-5)
            used.add(read.choose(row.tolist()))
            assert read.choose(row.tolist()) == [*weights][int(gates.argmax())]
    # logits of features as small as an embedding's differ by the experts' rows alone
    assert len(used) > 1 or not getattr(router, "normalize", True)
    for expert in moe.names:
        dense = build(name)
        theirs = peft.PeftModel.from_pretrained(dense, tmp_path / "served" / expert).eval()
        with moe.use_expert(expert):
            want = logits(moe(input_ids=IDS))
        torch.testing.assert_close(logits(theirs(input_ids=IDS)), want, rtol=0, atol=1e-5)
        assert not torch.allclose(want, logits(moe.to_dense()(input_ids=IDS)), atol=1e-3)
        said = json.loads((tmp_path / "served" / expert / "adapter_config.json").read_text())
        assert (said["r"], said["lora_alpha"]) == (4, moe.recipe.experts.alpha)
        assert said["fan_in_fan_out"] == (name == "GPT2")
        assert sorted(said["target_modules"]) == sorted(moe.sites)


@torch.no_grad()
def test_scaled_adapters_are_the_mixture(folder):
    """As llama.cpp adds them: the weight and, for each adapter, its scale times alpha / r B A."""
    moe, dense = filled("Llama"), build("Llama").eval()
    scales = {"expert0": 0.3, "expert1": 0.6}
    for name, scale in scales.items():
        said = json.loads((folder / name / "adapter_config.json").read_text())
        tensors = load_file(folder / name / "adapter_model.safetensors")
        for site in said["target_modules"]:
            a, b = (tensors[f"base_model.model.{site}.lora_{part}.weight"] for part in "AB")
            dense.get_submodule(site).weight += scale * said["lora_alpha"] / said["r"] * b @ a
    with moe.use_experts(scales):
        want = moe(input_ids=IDS).logits
    torch.testing.assert_close(dense(input_ids=IDS).logits, want, rtol=0, atol=1e-5)


def test_a_prompt_is_a_text_ids_or_a_chat(folder):
    read = AdapterRouter.load(folder)
    ids = [5, 7, 11]
    assert read.weights("w5 w7 w11") == read.weights(ids) != read.weights(ids[:2])
    messages = [{"role": "user", "content": "w5 w7"}, {"role": "assistant", "content": "w11"}]
    assert read.ids(messages) == [5, 7, 11, 1]
    assert read.names == ["expert0", "expert1"] and read.weights(ids).keys() == {
        "base", "expert0", "expert1",
    }  # fmt: skip


def test_only_what_is_before_the_cut_is_written(folder):
    moe, held = filled("Llama"), load_file(folder / "router" / "shallow.safetensors")
    cut = json.loads((folder / "router" / "router.json").read_text())["place"]
    assert cut == "model.layers.1" and "model.embed_tokens.weight" in held
    assert {n.split(".")[2] for n in held if n.startswith("model.layers.")} == {"0"}
    assert "lm_head.weight" not in held and "model.norm.weight" not in held
    assert len(moe.names) == len(list(folder.glob("*/adapter_model.safetensors")))


def test_what_is_no_prompt_is_refused(folder):
    read = AdapterRouter.load(folder)
    for prompt, words in (
        ("", "no tokens"), ([], "no tokens"), ([3, 10**6], "token 1000000"), ([-1], "token -1"),
        ([True], "token True"), ([3] * 10_000, "10000 tokens, expected at most"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            read.weights(prompt)
    read.tokenizer = tokenizer()
    with pytest.raises(InputError, match="no chat template"):
        read.choose([{"role": "user", "content": "w3"}])
    read.tokenizer = None
    with pytest.raises(InputError, match=r"has no tokenizer.*save_adapters\(folder, tokenizer"):
        read.choose("w3")


def changed(moe, **options):
    """The model as if it had been converted with another router."""
    made = copy.copy(moe)
    made.__dict__["router"] = copy.copy(moe.router)
    made.router.spec = dataclasses.replace(moe.router.spec, **options)
    return made


def refused(moe, words, place):
    with pytest.raises(ConversionError, match=words):
        moe.save_adapters(place / "served")
    assert list(place.iterdir()) == []


def test_a_router_that_chooses_for_no_prompt_is_refused_by_name(tmp_path):
    moe = filled("Llama")
    refused(changed(moe, granularity="token"), "granularity='token'.*by the request", tmp_path)
    rows = changed(
        moe, policy="expert", granularity="token", base=False, top_k=None, fit="gradient"
    )
    refused(rows, "policy='expert'.*among all rows", tmp_path)
    patches = changed(moe)
    patches.router.spec = PatchRouter(grid=2, per_expert=1)
    refused(patches, "this model has a PatchRouter", tmp_path)


@pytest.mark.sweep
def test_models_that_cannot_be_held_are_refused_by_name(tmp_path):
    upcycled = fresh(build("Llama"), split=1, mode="upcycle", num_experts=2)
    refused(upcycled, "this model has FFNExperts", tmp_path)
    vision = fresh(build("ViT"), split=1, router=TokenRouter(granularity="sequence"))
    refused(vision, "takes pixel_values", tmp_path)
    patches = fresh(build("ViT"), split=1, router=PatchRouter(grid=2, per_expert=1))
    refused(patches, "PatchRouter", tmp_path)
    trained = fresh(build("Llama"), split=1, router=PREFIX, freeze=False)
    refused(trained, "freeze=False", tmp_path)


def test_names_are_those_of_folders_and_experts_that_are_off_are_left_out(tmp_path):
    moe = copy.deepcopy(filled("Llama"))
    for name in ("base", "router", "../up", "a b"):
        moe.rename(0, name)
        with pytest.raises(ConfigError, match=r"expert .*moe\.rename"):
            moe.save_adapters(tmp_path / "served")
    moe.rename(0, "law")
    moe.deactivate(1)
    moe.save_adapters(tmp_path / "served")
    assert sorted(p.name for p in (tmp_path / "served").iterdir()) == ["law", "router"]
    moe.deactivate("law")
    with pytest.raises(ConversionError, match="every expert is off"):
        moe.save_adapters(tmp_path / "served")
    assert AdapterRouter.load(tmp_path / "served").names == ["law"]


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    moe, place = filled("Llama"), tmp_path / "served"
    place.mkdir()
    (place / "mine.txt").write_text("kept")
    with pytest.raises(ConfigError, match="holds files of something else"):
        moe.save_adapters(place)
    assert [p.name for p in place.iterdir()] == ["mine.txt"]
    (place / "mine.txt").unlink()
    moe.save_adapters(place)
    (place / "gone").mkdir()
    before = {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}
    wrong = adapters.gate_tensors(moe.router, [0, 1])
    wrong["weight"] = wrong["weight"].flip(0)
    monkeypatch.setattr(adapters, "gate_tensors", lambda *given: wrong)
    with pytest.raises(EquivalenceError, match="gates of what was written differ"):
        moe.save_adapters(place)
    assert before == {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}
    monkeypatch.undo()
    moe.save_adapters(place)
    assert not (place / "gone").exists() and [*tmp_path.iterdir()] == [place]


def test_a_damaged_folder_is_refused(folder, tmp_path):
    import shutil

    def damaged(change):
        shutil.rmtree(tmp_path / "served", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "served")
        change(tmp_path / "served" / "router")

    def said(**facts):
        def change(place):
            old = json.loads((place / "router.json").read_text())
            (place / "router.json").write_text(json.dumps(old | facts))

        return change

    def without_a_tensor(place):
        tensors = load_file(place / "router.safetensors")
        save_file({"weight": tensors["weight"]}, place / "router.safetensors")

    def without_weights(place):
        tensors = load_file(place / "shallow.safetensors")
        kept = {n: t for n, t in tensors.items() if "mlp" not in n}
        save_file(kept, place / "shallow.safetensors")

    for change, words in (
        (said(version=2), "version 2, expected 1"), (said(kind="os"), "'os' is no model"),
        (said(experts=["../x"]), r"experts=\['../x'\]"), (said(gate={}), "gate="),
        (said(place="model.nowhere"), "nowhere"), (said(dtype="load"), "no dtype"),
        (said(extra=1), "extra"), (without_a_tensor, "router.safetensors"),
        (without_weights, r"no model\.layers\.0\.mlp.*weight, which runs before the cut"),
        (lambda place: (place / "router.json").unlink(), "has no router/router.json: expected"),
        (lambda place: (place / "shallow.safetensors").write_bytes(b"x"), "not a safetensors file"),
    ):  # fmt: skip
        damaged(change)
        with pytest.raises(CheckpointError, match=words):
            AdapterRouter.load(tmp_path / "served")
